"""Rectified-flow mathematics: pure functions of tensors, any float dtype.

Notation (one sigma per sample, `sigma` is `[B]` and broadcast over `[B, ...]`):

    x_sigma = (1 - sigma) x0 + sigma noise        velocity = noise - x0        x0 = x_sigma - sigma velocity

A model may have experts, networks that each serve the noise levels between two boundaries. Which of them runs steers
collectives, so it is decided in Python, by a `level` that travels beside the tensor `sigma`: reading it back from the
tensor would stop the host at every forward, and a dry run's tensors hold no numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000  # a Wan-like network is handed timestep = 1000 sigma
ALL_STEPS = range(NUM_TRAIN_TIMESTEPS)

# (x_sigma [B, ...], sigma [B], a level that the expert of every sigma serves) -> velocity [B, ...]
Velocity = Callable[[Tensor, Tensor, float], Tensor]
Sigma = TypeVar("Sigma", float, Tensor)


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """Reshape `sigma` `[B]` to `[B, 1, ..., 1]` with `like`'s number of dims."""
    return sigma.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise."""
    s = expand(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """The regression target of a velocity network: noise - x0."""
    return noise - x0


def x0_from_velocity(x_sigma: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x0-prediction of a velocity network: x_sigma - sigma velocity."""
    return x_sigma - expand(sigma, x_sigma) * velocity


def velocity_from_x0(x_sigma: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Inverse of `x0_from_velocity` for sigma > 0."""
    return (x_sigma - x0) / expand(sigma, x_sigma)


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One Euler step of the probability-flow ODE from `sigma` to `next_sigma`."""
    return x + expand(next_sigma - sigma, x) * velocity


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance in diffusers' convention: `guidance_scale` 1.0 means none."""
    return unconditional + guidance_scale * (conditional - unconditional)


def shift_sigma(t: Sigma, shift: float) -> Sigma:
    """Time shift: shift t / (1 + (shift - 1) t), maps [0, 1] onto itself."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_sigmas(num_steps: int, shift: float) -> list[float]:
    """The `num_steps + 1` descending sigmas of an Euler chain: t = 1, 1 - 1/n, ... shifted, and a final 0.

    `sampling_sigmas(4, 5.0)` is 1, 0.9375, 0.8333, 0.625, 0: the student's sigmas of SGMD (arXiv 2605.30116).
    """
    t = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return shift_sigma(t, shift).tolist()


def renoise_sigma(u: Tensor, shift: float, sigma_min: float, sigma_max: float, steps: range = ALL_STEPS) -> Tensor:
    """Noise levels for score matching from uniform draws `u` in [0, 1).

    `u` picks one of the 1000 training timesteps; its sigma is shifted and clamped to [sigma_min, sigma_max].

    Args:
        steps: the part of the timesteps, counted from 0, to pick from.
    """
    t = (torch.floor(u * len(steps)) + steps.start + 1) / NUM_TRAIN_TIMESTEPS
    return shift_sigma(t, shift).clamp(sigma_min, sigma_max)


def renoise_level(step: int, shift: float, sigma_min: float, sigma_max: float) -> float:
    """The level that `renoise_sigma` gives to training timestep `step`, counted from 0."""
    return min(max(shift_sigma((step + 1) / NUM_TRAIN_TIMESTEPS, shift), sigma_min), sigma_max)


def renoise_sections(boundaries: Iterable[float], shift: float, sigma_min: float, sigma_max: float) -> list[range]:
    """The training timesteps cut where the level of `renoise_sigma` reaches a boundary, without empty parts.

    A part's share of the 1000 timesteps is the probability of its levels: to draw a timestep, and then a level in the
    timestep's part, is to draw a level.
    """

    def first(boundary: float) -> int:
        levels = (shift, sigma_min, sigma_max)
        return bisect_left(ALL_STEPS, True, key=lambda step: reaches(renoise_level(step, *levels), boundary))

    cuts = [0, *(first(boundary) for boundary in sorted(boundaries)), NUM_TRAIN_TIMESTEPS]
    return [range(start, stop) for start, stop in pairwise(cuts) if start < stop]


def shifted_sigma(u: Tensor, shift: float, lowest: float = 0.0, highest: float = 1.0) -> Tensor:
    """Time-shifted noise levels of uniform draws `u` in [0, 1), float32: those of them in [lowest, highest).

    By default all; the probability of others is that of `shift_sigma(highest, 1 / shift)` less that of `lowest`.
    """
    if (lowest, highest) == (0.0, 1.0):
        return shift_sigma(u, shift).float()
    start, stop = shift_sigma(lowest, 1 / shift), shift_sigma(highest, 1 / shift)
    below = 1.0 if highest == 1 else float(np.nextafter(np.float32(highest), np.float32(0)))
    return shift_sigma(start + u * (stop - start), shift).float().clamp(lowest, below)


def reaches(level: float, boundary: float) -> bool:
    """Whether a noise level is served by the expert above `boundary`: the boundary itself is, as in diffusers.

    Both are rounded to float32, as the noise levels of a batch are: level and batch never fall on different sides.
    """
    return bool(np.float32(level) >= np.float32(boundary))


def integrate(velocity: Velocity, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler chain over `sigmas` (descending) from `x` at `sigmas[0]`; returns x at the last sigma."""
    for sigma, next_sigma in pairwise(sigmas):
        s = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
        x = euler_step(x, velocity(x, s, sigma), s, torch.full_like(s, next_sigma))
    return x
