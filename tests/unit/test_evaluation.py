"""Scores know motion, consistency and distance of videos whose truth is known."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from sgmd_dist.data.world import DIRECTIONS, World, latents_to_rgb
from sgmd_dist.evaluation import (
    contact_sheet_gif,
    jitter,
    latent_motion,
    motion,
    motion_ratio,
    score,
    sliced_wasserstein,
    velocity,
)


def videos(world: World, num: int, seed: int = 0) -> torch.Tensor:
    return torch.stack([world.sample(seed, index).latents for index in range(num)])


@pytest.fixture(scope="module")
def world_samples():
    samples = [World().sample(0, index) for index in range(400)]
    return samples, torch.stack([sample.latents for sample in samples])


def noise_like(latents: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))


def test_motion_reads_the_true_velocity_of_every_world_sample(world_samples):
    samples, latents = world_samples
    expected = torch.tensor([[sample.speed * step for step in DIRECTIONS[sample.direction]] for sample in samples])
    assert (velocity(latents) - expected).abs().max() < 0.02
    assert (motion(latents) - expected.norm(dim=1)).abs().max() < 0.02


def test_motion_is_robust_to_noise_and_scale(world_samples):
    _, latents = world_samples
    noisy = 0.5 * (latents + 0.5 * noise_like(latents))
    assert (motion(noisy) - motion(latents)).abs().mean() < 0.05
    assert motion_ratio(noisy, latents) == pytest.approx(1, abs=0.02)


def test_a_still_video_has_no_motion_and_trembling_is_not_motion(world_samples):
    _, latents = world_samples
    still = latents[:, :, :1].expand_as(latents)
    trembling = still.clone()
    trembling[:, :, 1::2] = trembling[:, :, 1::2].roll(1, dims=-1)
    assert motion(still).max() < 1e-9
    assert motion(trembling).mean() < 0.2
    assert latent_motion(still).max() == 0
    assert latent_motion(latents).min() > 0.1


def test_motion_ratio_of_half_the_speed_is_half():
    fast, slow = World(speeds=(1.5,)), World(speeds=(0.75,))
    assert motion_ratio(videos(slow, 50), videos(fast, 50, seed=1)) == pytest.approx(0.5, abs=0.01)


def test_jitter_is_smallest_for_true_samples_at_any_speed(world_samples):
    _, latents = world_samples
    true = jitter(latents)
    assert true.max() < 0.08
    flicker = latents * (1 + 0.2 * torch.randn(len(latents), 1, 8, 1, 1, generator=torch.Generator().manual_seed(1)))
    shuffled = latents[:, :, torch.tensor([0, 2, 1, 3, 5, 4, 7, 6])]
    for worse in (flicker, shuffled, latents + 0.1 * noise_like(latents)):
        assert jitter(worse).mean() > 3 * true.mean()
    assert jitter(noise_like(latents)).mean() > 0.8


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


def test_score_collects_the_three_numbers(world_samples):
    _, latents = world_samples
    scores = score(latents[:200], latents[200:])
    assert set(scores.as_dict()) == {"swd", "motion_ratio", "jitter"}
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
