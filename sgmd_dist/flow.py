"""Rectified-flow mathematics: pure functions of tensors, any float dtype.

Notation (one sigma per sample, `sigma` is `[B]` and broadcast over `[B, ...]`):

    x_sigma = (1 - sigma) x0 + sigma noise        velocity = noise - x0        x0 = x_sigma - sigma velocity
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000  # a Wan-like network is handed timestep = 1000 sigma

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_sigma [B, ...], sigma [B]) -> velocity [B, ...]


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


def shift_sigma(t: Tensor, shift: float) -> Tensor:
    """Time shift: shift t / (1 + (shift - 1) t), maps [0, 1] onto itself."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_sigmas(num_steps: int, shift: float) -> list[float]:
    """The `num_steps + 1` descending sigmas of an Euler chain: t = 1, 1 - 1/n, ... shifted, and a final 0.

    `sampling_sigmas(4, 5.0)` is 1, 0.9375, 0.8333, 0.625, 0: the student's sigmas of SGMD (arXiv 2605.30116).
    """
    t = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return shift_sigma(t, shift).tolist()


def renoise_sigma(u: Tensor, shift: float, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise levels for score matching from uniform draws `u` in [0, 1).

    `u` picks one of the 1000 training timesteps; its sigma is shifted and clamped to [sigma_min, sigma_max].
    """
    t = (torch.floor(u * NUM_TRAIN_TIMESTEPS) + 1) / NUM_TRAIN_TIMESTEPS
    return shift_sigma(t, shift).clamp(sigma_min, sigma_max)


def integrate(velocity: Velocity, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler chain over `sigmas` (descending) from `x` at `sigmas[0]`; returns x at the last sigma."""
    for sigma, next_sigma in pairwise(sigmas):
        s = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
        x = euler_step(x, velocity(x, s), s, torch.full_like(s, next_sigma))
    return x
