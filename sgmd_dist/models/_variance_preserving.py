"""A v-prediction network of a variance-preserving diffusion, as a velocity network of the rectified flow.

With c = sqrt((1 - sigma)² + sigma²), the flow's x_sigma = (1 - sigma) x0 + sigma noise is c times the diffusion's

    z = a x0 + s noise        a = (1 - sigma) / c,  s = sigma / c,  a² + s² = 1,

of the same ratio of signal to noise. From z and v = a noise - s x0 follow x0 = a z - s v and noise = s z + a v, so

    noise - x0 = (s - a) z + (a + s) v = ((2 sigma - 1) x_sigma / c + v) / c.

Both are one process on two scales: a step of deterministic DDIM from one timestep to another is the flow's Euler step
between their sigmas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sgmd_dist.flow import expand

Predict = Callable[[Tensor, Tensor], Tensor]  # (z [B, ...], timestep [B]) -> v [B, ...]


def flow_velocity(predict: Predict, x: Tensor, sigma: Tensor, levels: Sequence[float]) -> Tensor:
    """The rectified flow's velocity of a network that predicts v.

    Args:
        predict: the network; v in x's dtype.
        x: x_sigma `[B, ...]`, float32 or float64.
        sigma: `[B]` noise levels in [0, 1].
        levels: the sigma of each of the diffusion's timesteps, see `noise_levels`.

    Returns:
        noise - x0, `[B, ...]` in x's dtype: exact where v is.
    """
    wide = expand(sigma, x)
    scale = ((1 - wide) ** 2 + wide**2).sqrt()
    z = x / scale
    return ((2 * wide - 1) * z + predict(z, timestep_of(sigma, levels))) / scale


def timestep_of(sigma: Tensor, levels: Sequence[float]) -> Tensor:
    """The timesteps `[B]` at the levels `sigma` `[B]`, in sigma's dtype: along a line between two of them.

    Levels below the first timestep's are given that one, and above the last one's the last.
    """
    known = torch.tensor(levels, dtype=sigma.dtype, device=sigma.device)
    above = torch.searchsorted(known, sigma.contiguous()).clamp(1, len(levels) - 1)
    low, high = known[above - 1], known[above]
    return (above - 1 + (sigma - low) / (high - low)).clamp(0, len(levels) - 1)


def noise_levels(betas: np.ndarray, *, snr_shift_scale: float, rescale_betas_zero_snr: bool) -> list[float]:
    """The flow's sigma of each timestep of a diffusion, ascending.

    Args:
        betas: of its steps, float64.
        snr_shift_scale: divides the ratio of signal to noise.
        rescale_betas_zero_snr: whether amplitudes are stretched so that the last timestep is pure noise, sigma = 1.
    """
    product = np.cumprod(1 - betas)
    product = product / (snr_shift_scale + (1 - snr_shift_scale) * product)
    amplitude = np.sqrt(product)
    if rescale_betas_zero_snr:
        first, last = amplitude[0], amplitude[-1]
        amplitude = (amplitude - last) * first / (first - last)
    noise = np.sqrt(1 - amplitude**2)
    return (noise / (amplitude + noise)).tolist()
