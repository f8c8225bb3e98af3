"""Distances between sets of samples; pure functions, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1024  # rows of a distance matrix at a time


def sliced_wasserstein(a: Tensor, b: Tensor, num_projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two sets `[N, ...]` and `[M, ...]` of one sample shape.

    Root mean square, over `num_projections` random unit directions, of the 2-Wasserstein distance of the projected
    sets: on the scale of one latent element, whatever the latents' size. The directions depend on `seed` and the
    shape only. It sees amplitude, colour and blur well, speed little (the ratios are for that).
    """
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"sliced_wasserstein: sample shapes differ: {tuple(a.shape[1:])} and {tuple(b.shape[1:])}")
    flat_a, flat_b = a.double().flatten(1), b.double().flatten(1)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(flat_a.shape[1], num_projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    sorted_a = (flat_a @ directions.to(flat_a)).sort(dim=0).values
    sorted_b = (flat_b @ directions.to(flat_b)).sort(dim=0).values
    if len(sorted_a) != len(sorted_b):
        size = max(len(sorted_a), len(sorted_b))
        sorted_a, sorted_b = _quantiles(sorted_a, size), _quantiles(sorted_b, size)
    return float((sorted_a - sorted_b).square().mean().sqrt())


def _quantiles(values: Tensor, size: int) -> Tensor:
    """`size` mid-point quantiles of sorted `values` `[N, P]`."""
    levels = (torch.arange(size, dtype=values.dtype, device=values.device) + 0.5) / size
    return values[(levels * len(values)).long()]


def energy_distance(a: Tensor, b: Tensor, within_b: float | None = None) -> float:
    """Squared energy distance 2 E|A - B| - E|A - A'| - E|B - B'| of sets `[N, D]` and `[M, D]` (Székely, Rizzo 2013).

    The unbiased U-statistic: pairs of a sample with itself are left out, so that two sets of one distribution have
    the mean 0, and single values may be negative.

    Args:
        within_b: `mean_distance(b)`, where it is known.
    """
    within = mean_distance(a) + (mean_distance(b) if within_b is None else within_b)
    return 2 * _sum_of_distances(a.double(), b.double()) / (len(a) * len(b)) - within


def mean_distance(x: Tensor) -> float:
    """Between two different samples of a set `[N, D]`."""
    x = x.double()
    return _sum_of_distances(x, x) / (len(x) * (len(x) - 1))


def _sum_of_distances(a: Tensor, b: Tensor) -> float:
    """Over all pairs, from differences: through products a sample would be some way from itself."""
    exact = "donot_use_mm_for_euclid_dist"
    return sum(float(torch.cdist(rows, b, compute_mode=exact).sum()) for rows in a.split(_CHUNK))
