"""Scores of sets whose truth is known."""

from __future__ import annotations

import math

import pytest
import torch

from sgmd_dist.benchmarks.science import scores


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_wasserstein_of_numbers() -> None:
    a = normal(1000)
    assert scores.wasserstein_1d(a, a.flip(0)) == 0
    assert scores.wasserstein_1d(a, a + 0.25) == pytest.approx(0.25)
    assert scores.wasserstein_1d(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0])) == pytest.approx(2 / 3)
    assert scores.wasserstein_1d(a.repeat(2), a) == pytest.approx(0, abs=1e-12)


def test_quadratic_mean() -> None:
    assert scores.root_mean_square([3.0, 4.0]) == pytest.approx(math.sqrt(12.5))


@pytest.mark.parametrize("dim", [1, 2, 16])
def test_a_mode_holds_the_same_share_of_its_mass_in_every_dimension(dim: int) -> None:
    inside = (normal(40_000, dim).norm(dim=1) <= scores.mode_radius(dim)).double().mean().item()
    assert inside == pytest.approx(1 - math.exp(-4.5), abs=0.003)
    if dim == 2:
        assert scores.mode_radius(dim) == pytest.approx(3.0)


def test_nearest_modes_are_found_in_the_covariances_metric() -> None:
    means = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    covariance = torch.diag(torch.tensor([1.0, 0.01]))
    samples = torch.tensor([[1.0, 0.1], [2.0, 0.1], [0.0, 1.0], [6.5, 0.0]])
    modes, is_inside = scores.nearest_modes(samples, means, covariance)
    assert modes.tolist() == [0, 1, 0, 1]
    assert is_inside.tolist() == [True, True, False, False]
    assert scores.precision(is_inside) == 0.5


def test_a_mode_is_covered_from_half_of_its_share_on() -> None:
    wanted = torch.arange(4).repeat_interleave(100)
    found = torch.cat([torch.full((n,), k) for k, n in enumerate((250, 50, 49, 51))])
    everywhere = torch.ones(400, dtype=torch.bool)
    assert scores.mode_coverage(found, everywhere, wanted, everywhere) == 0.75
    outside = everywhere.clone()
    outside[found == 3] = False
    assert scores.mode_coverage(found, outside, wanted, everywhere) == 0.5


def test_modes_that_the_reference_hardly_has_are_not_counted() -> None:
    everywhere = torch.ones(1000, dtype=torch.bool)
    wanted = torch.zeros(1000, dtype=torch.long)
    wanted[:9] = 1
    assert scores.mode_coverage(torch.zeros_like(wanted), everywhere, wanted, everywhere) == 1
    wanted[:10] = 1
    assert scores.mode_coverage(torch.zeros_like(wanted), everywhere, wanted, everywhere) == 0.5


def test_slope_and_jitter_of_a_track() -> None:
    frames = torch.arange(8.0, dtype=torch.float64)
    steady = torch.stack([1 + 0.5 * frames, 2 - 0.25 * frames], 1)[None]
    torch.testing.assert_close(scores.slope(steady), torch.tensor([[0.5, -0.25]], dtype=torch.float64))
    assert scores.jitter(steady) == pytest.approx(0, abs=1e-12)
    assert scores.jitter(steady + frames[:, None] ** 2 / 2) == pytest.approx(1)
    noise = normal(500, 8, 2)
    assert scores.jitter(steady + 0.1 * noise) == pytest.approx(0.1 * math.sqrt(6), rel=0.05)
    assert scores.slope(steady + 0.1 * noise).mean(0).tolist() == pytest.approx([0.5, -0.25], abs=0.005)
