"""Scores of samples against a teacher's samples in worlds whose modes are known; pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WITHIN_STD = 3.0  # of a mode in two dimensions; in others the ellipsoid with the same share of the mode's mass
MIN_SHARE = 0.01  # of the reference's samples for one prompt: rarer modes need not be covered


def root_mean_square(values: Sequence[float]) -> float:
    """The quadratic mean: of distances, 0 only where every one is 0."""
    return math.sqrt(sum(value**2 for value in values) / len(values))


def wasserstein_1d(a: Tensor, b: Tensor) -> float:
    """1-Wasserstein distance of two sets of numbers `[N]` and `[M]`: the area between their distribution functions."""
    a, b = a.double().sort().values, b.double().sort().values
    places = torch.cat([a, b]).sort().values
    gaps = places.diff()
    below_a, below_b = (torch.searchsorted(x, places[:-1], right=True) / len(x) for x in (a, b))
    return float(((below_a.double() - below_b.double()).abs() * gaps).sum())


def nearest_modes(samples: Tensor, means: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest mode of every sample `[N]`, and whether the sample is one of it `[N]` (see `WITHIN_STD`).

    Args:
        samples: `[N, D]`.
        means: `[K, D]` of Gaussian modes with one covariance `[D, D]`; near is meant in its metric.
    """
    root = torch.linalg.cholesky(covariance.double())
    whitened = [torch.linalg.solve_triangular(root, x.double().T, upper=False).T for x in (samples, means)]
    distance, mode = torch.cdist(*whitened).min(dim=1)
    return mode, distance <= mode_radius(means.shape[1])


def mode_radius(dim: int) -> float:
    """The radius within which a standard normal in `dim` dimensions has the mass that 3 std have in two: 98.9 %."""
    mass = 1 - math.exp(-(WITHIN_STD**2) / 2)
    low, high = 0.0, 10.0 + 2 * math.sqrt(dim)
    for _ in range(60):
        middle = (low + high) / 2
        inside = torch.special.gammainc(*torch.tensor([dim / 2, middle**2 / 2], dtype=torch.float64))
        low, high = (middle, high) if inside < mass else (low, middle)
    return high


def precision(is_inside: Tensor) -> float:
    """Share of samples that belong to a mode."""
    return float(is_inside.double().mean())


def mode_coverage(modes: Tensor, is_inside: Tensor, reference_modes: Tensor, reference_is_inside: Tensor) -> float:
    """Share of the reference's modes that samples hit at least half as often as the reference does.

    Both come from `nearest_modes`; samples that belong to no mode hit none. Modes that the reference has hardly, see
    `MIN_SHARE`, are not counted.
    """
    size = int(torch.cat([modes, reference_modes]).max()) + 1
    found, wanted = (
        torch.bincount(x[inside], minlength=size).double() / len(x)
        for x, inside in ((modes, is_inside), (reference_modes, reference_is_inside))
    )
    counted = wanted >= MIN_SHARE
    return float((found[counted] >= wanted[counted] / 2).double().mean())


def slope(tracks: Tensor) -> Tensor:
    """The velocity `[N, 2]` per frame of tracks `[N, F, 2]`, by least squares."""
    frames = torch.arange(tracks.shape[1], dtype=tracks.dtype) - (tracks.shape[1] - 1) / 2
    return torch.einsum("f,nfc->nc", frames / frames.square().sum(), tracks)


def jitter(tracks: Tensor) -> float:
    """Root mean square of the second differences over time of tracks `[N, F, 2]`; 0 for constant velocities."""
    return float(tracks.double().diff(n=2, dim=1).square().mean().sqrt())
