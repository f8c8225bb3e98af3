"""Scores of videos whose truth is known, and pictures of them."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from sgmd_dist.data.world import World, latents_to_rgb
from sgmd_dist.evaluation import (
    contact_sheet_gif,
    score,
    sliced_wasserstein,
)


def videos(world: World, num: int, seed: int = 0) -> torch.Tensor:
    return torch.stack([world.sample(seed, index).latents for index in range(num)])


def noise_like(latents: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))


def test_swd_is_zero_for_equal_sets_in_any_order_and_symmetric(world_samples):
    _, latents = world_samples
    assert sliced_wasserstein(latents, latents.flip(0)) == pytest.approx(0, abs=1e-12)
    a, b = latents[:150], 0.5 * latents[150:300]
    assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(b, a))


def test_swd_of_gaussians_is_the_closed_form():
    """Projected: W2 of N(0, 1) and N(m, s^2) is sqrt(m^2 + (1 - s)^2), with m the shift along the direction."""
    a, b = torch.randn(2, 4000, 1, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(a, 3 * b) == pytest.approx(2, rel=0.05)
    assert sliced_wasserstein(a, b + 1) == pytest.approx(1, rel=0.15)


def test_swd_accepts_sets_of_different_sizes_and_refuses_different_shapes(world_samples):
    _, latents = world_samples
    assert sliced_wasserstein(latents[:100].repeat(3, 1, 1, 1, 1), latents[:100]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="shapes differ"):
        sliced_wasserstein(latents, latents[:, :, :4])


def test_swd_tells_what_a_lazy_generator_does(world_samples):
    _, latents = world_samples
    reference = videos(World(), 400, seed=9)
    floor = sliced_wasserstein(latents, reference)
    still = latents[:, :, :1].expand_as(latents)
    assert sliced_wasserstein(still, reference) > 1.1 * floor
    assert sliced_wasserstein(0.7 * latents, reference) > 2 * floor


def test_ratios_of_half_the_speed_are_about_half():
    fast, slow = World(speeds=(1.5,)), World(speeds=(0.75,))
    scores = score(videos(slow, 50), videos(fast, 50, seed=1))
    assert scores.speed_ratio == pytest.approx(0.5, abs=0.01)
    assert scores.motion_ratio == pytest.approx(0.5, abs=0.1)


def test_score_collects_the_numbers(world_samples):
    _, latents = world_samples
    scores = score(latents[:200], latents[200:])
    assert set(scores.as_dict()) == {"swd", "motion_ratio", "speed_ratio", "jitter"}
    assert all(math.isfinite(value) for value in scores.as_dict().values())
    assert scores.motion_ratio == pytest.approx(1, abs=0.15)


def test_the_contact_sheet_is_an_animation_with_every_frame_and_column(world_samples, tmp_path):
    samples, latents = world_samples
    path = tmp_path / "pictures" / "samples.gif"
    prompts = [sample.caption for sample in samples[:3]]
    contact_sheet_gif(path, {"teacher": latents[:3], "after": latents[3:6]}, latents_to_rgb, prompts=prompts)
    with Image.open(path) as picture:
        assert picture.n_frames == 8
        assert picture.info["loop"] == 0
        assert picture.width > 2 * 120
        assert picture.height > 3 * 120


def test_a_contact_sheet_of_unequal_columns_is_refused(world_samples, tmp_path):
    _, latents = world_samples
    with pytest.raises(ValueError, match="after"):
        contact_sheet_gif(tmp_path / "x.gif", {"teacher": latents[:3], "after": latents[:2]}, latents_to_rgb)
