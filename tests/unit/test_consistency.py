"""Steadiness of videos whose truth is known."""

from __future__ import annotations

import math

import pytest
import torch

from sgmd_dist.consistency import frame_colour_drift, frame_consistency


def still(num_frames: int = 4) -> torch.Tensor:
    """Two videos `[2, 3, F, 5, 6]` that show one picture each."""
    picture = torch.randn(2, 3, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    return picture.expand(-1, -1, num_frames, -1, -1)


@pytest.mark.parametrize("num_frames", [1, 4])
def test_a_still_video_is_wholly_consistent_and_does_not_drift(num_frames: int) -> None:
    assert frame_consistency(still(num_frames)).tolist() == pytest.approx([1.0, 1.0])
    assert frame_colour_drift(still(num_frames)).tolist() == [0.0, 0.0]


def test_consistency_is_the_mean_cosine_of_neighbouring_frames() -> None:
    turning = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -2.0]])  # by 90 and by 180 degrees
    latents = turning.T.reshape(1, 2, 3, 1, 1)
    assert frame_consistency(latents).tolist() == pytest.approx([(0 - 1) / 2])


def test_brightness_alone_changes_no_consistency_and_drifts() -> None:
    latents = still() * torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 4, 1, 1)
    assert frame_consistency(latents).tolist() == pytest.approx([1.0, 1.0])
    assert frame_colour_drift(latents).tolist() == pytest.approx((3 * frame_colour_drift_of_one(still())).tolist())


def frame_colour_drift_of_one(latents: torch.Tensor) -> torch.Tensor:
    """The drift from black to the first frame."""
    return latents[:, :, 0].double().mean(dim=(2, 3)).square().mean(dim=1).sqrt()


def test_drift_is_the_root_mean_square_over_channels() -> None:
    latents = torch.zeros(1, 2, 3, 4, 4)
    latents[:, 0, -1] = 3.0
    latents[:, 1, -1] = -4.0
    assert frame_colour_drift(latents).item() == pytest.approx(math.sqrt(12.5))
