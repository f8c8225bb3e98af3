"""Distances between sets whose truth is known."""

from __future__ import annotations

import math

import pytest
import torch

from sgmd_dist.data.world import World
from sgmd_dist.distances import energy_distance, sliced_wasserstein


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    reference = torch.stack([World().sample(9, index).latents for index in range(400)])
    floor = sliced_wasserstein(latents, reference)
    still = latents[:, :, :1].expand_as(latents)
    assert sliced_wasserstein(still, reference) > 1.1 * floor
    assert sliced_wasserstein(0.7 * latents, reference) > 2 * floor


def test_energy_distance_of_normals_is_the_closed_form() -> None:
    """E|N(m, s²)| = s sqrt(2 / pi) exp(-m² / 2 s²) + m erf(m / s sqrt 2), here with s² = 2 for every pair."""
    shift = 1.0
    within = 2 / math.sqrt(math.pi)
    between = within * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    found = energy_distance(normal(3000, 1), normal(2500, 1, seed=1) + shift)
    assert found == pytest.approx(2 * (between - within), rel=0.1)


def test_energy_distance_is_unbiased() -> None:
    """Small sets of one distribution: zero on average, with both signs; the biased statistic would be 0.07 or more."""
    values = [energy_distance(normal(20, 2, seed=2 * i), normal(20, 2, seed=2 * i + 1)) for i in range(200)]
    mean, spread = torch.tensor(values).mean().item(), torch.tensor(values).std().item()
    assert abs(mean) < 4 * spread / math.sqrt(200) < 0.03
    assert min(values) < 0 < max(values)


def test_energy_distance_of_many_samples_is_that_of_all_pairs() -> None:
    a, b = normal(1500, 2), normal(1100, 2, seed=1)
    pairs = [torch.cdist(x, y).sum().item() for x, y in ((a, b), (a, a), (b, b))]
    expected = 2 * pairs[0] / (1500 * 1100) - pairs[1] / (1500 * 1499) - pairs[2] / (1100 * 1099)
    assert energy_distance(a, b) == pytest.approx(expected, abs=1e-6)
