"""Scores of videos whose truth is known, and pictures of them."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from sgmd_dist.data.world import World, latents_to_rgb
from sgmd_dist.evaluation import contact_sheet, score, write_sheets_gif


def videos(world: World, num: int, seed: int = 0) -> torch.Tensor:
    return torch.stack([world.sample(seed, index).latents for index in range(num)])


def test_ratios_of_half_the_speed_are_about_half():
    fast, slow = World(speeds=(1.5,)), World(speeds=(0.75,))
    scores = score(videos(slow, 50), videos(fast, 50, seed=1))
    assert scores.speed_ratio == pytest.approx(0.5, abs=0.01)
    assert scores.motion_ratio == pytest.approx(0.5, abs=0.1)


def test_score_collects_the_numbers(world_samples):
    _, latents = world_samples
    scores = score(latents[:200], latents[200:])
    names = ["swd", "motion_ratio", "speed_ratio", "jitter", "consistency", "frame_colour_drift", "energy"]
    assert list(scores.as_dict()) == names
    assert all(math.isfinite(value) for value in scores.as_dict().values())
    assert scores.motion_ratio == pytest.approx(1, abs=0.15)
    assert abs(scores.as_dict()["energy"]) < 0.01
    assert "energy" not in score(latents[:1], latents[200:]).as_dict(), "one video has no spread"


def test_real_videos_add_the_same_distances_to_them(world_samples):
    _, latents = world_samples
    half, reference, real = 0.5 * latents[:100], latents[100:200], latents[200:300]
    both = score(half, reference, real).as_dict()
    swapped = score(half, real, reference).as_dict()
    for name in ("swd", "energy"):
        assert both[f"{name}_real"] == swapped[name] and both[name] == swapped[f"{name}_real"]
        assert both[f"{name}_real"] > 0.1


def test_the_contact_sheet_is_an_animation_with_every_frame_and_column(world_samples, tmp_path):
    samples, latents = world_samples
    path = tmp_path / "pictures" / "samples.gif"
    prompts = [sample.caption for sample in samples[:3]]
    sheets = contact_sheet({"teacher": latents[:3], "after": latents[3:6]}, latents_to_rgb, prompts=prompts)
    write_sheets_gif(path, sheets, 8.0)
    with Image.open(path) as picture:
        assert picture.n_frames == 8
        assert picture.info["loop"] == 0
        assert picture.width > 2 * 120
        assert picture.height > 3 * 120


def test_a_contact_sheet_of_unequal_columns_is_refused(world_samples):
    _, latents = world_samples
    with pytest.raises(ValueError, match="after"):
        contact_sheet({"teacher": latents[:3], "after": latents[:2]}, latents_to_rgb)
