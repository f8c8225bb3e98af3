"""Motion, speed and jitter of videos whose truth is known."""

from __future__ import annotations

import torch

from sgmd_dist.data.world import DIRECTIONS
from sgmd_dist.motion import jitter, latent_motion, speed, velocity


def noise_like(latents: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))


def test_latent_motion_is_the_mean_difference_of_neighbouring_frames() -> None:
    latents = torch.zeros(1, 2, 3, 2, 2)
    latents[:, :, 1], latents[:, :, 2] = 1.0, -2.0
    assert latent_motion(latents).tolist() == [2.0]
    assert latent_motion(latents.requires_grad_()).requires_grad is False
    assert latent_motion(torch.randn(2, 3, 1, 4, 4)).tolist() == [0.0, 0.0], "an image does not move"


def test_velocity_reads_the_true_velocity_of_every_world_sample(world_samples):
    samples, latents = world_samples
    expected = torch.tensor([[sample.speed * step for step in DIRECTIONS[sample.direction]] for sample in samples])
    assert (velocity(latents) - expected).abs().max() < 0.02
    assert (speed(latents) - expected.norm(dim=1)).abs().max() < 0.02


def test_speed_is_robust_to_noise_and_scale(world_samples):
    _, latents = world_samples
    noisy = 0.5 * (latents + 0.5 * noise_like(latents))
    assert (speed(noisy) - speed(latents)).abs().mean() < 0.05


def test_a_still_video_has_neither_and_trembling_is_no_speed(world_samples):
    _, latents = world_samples
    still = latents[:, :, :1].expand_as(latents)
    trembling = still.clone()
    trembling[:, :, 1::2] = trembling[:, :, 1::2].roll(1, dims=-1)
    assert speed(still).max() < 1e-9
    assert speed(trembling).mean() < 0.2
    assert latent_motion(trembling).mean() > 0.1
    assert latent_motion(still).max() == 0
    assert latent_motion(latents).min() > 0.04


def test_jitter_is_smallest_for_true_samples_at_any_speed(world_samples):
    _, latents = world_samples
    true = jitter(latents)
    assert true.max() < 0.08
    flicker = latents * (1 + 0.2 * torch.randn(len(latents), 1, 8, 1, 1, generator=torch.Generator().manual_seed(1)))
    shuffled = latents[:, :, torch.tensor([0, 2, 1, 3, 5, 4, 7, 6])]
    for worse in (flicker, shuffled, latents + 0.1 * noise_like(latents)):
        assert jitter(worse).mean() > 3 * true.mean()
    assert jitter(noise_like(latents)).mean() > 0.8
