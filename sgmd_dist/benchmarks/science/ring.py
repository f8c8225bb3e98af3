"""Points on a ring: eight narrow Gaussian modes, half of the ring for each of two prompts; latents `[2, 1, 1, 1]`.

Guidance pushes a half's samples away from the other half, to its two inner modes: the outer ones become rare without
being lost, and no mode becomes wider.
"""

from __future__ import annotations

import math

import torch

from sgmd_dist.benchmarks.science.exact import Mixture, MixtureWorld

NUM_MODES = 8
NUM_CLASSES = 2
RADIUS = 2.0
STD = 0.2  # neighbours are 7.6 std apart


def build() -> MixtureWorld:
    """The world."""
    return MixtureWorld(
        "ring",
        (2, 1, 1, 1),
        _mixture(),
        batch_size=128,
        guidance_scale=2.0,
        sigma_shift=5.0,
        num_samples=4096,
    )


def _mixture() -> Mixture:
    modes = torch.arange(NUM_MODES)
    angles = 2 * math.pi * modes.double() / NUM_MODES
    means = RADIUS * torch.stack([angles.cos(), angles.sin()], 1)
    of_class = modes * NUM_CLASSES // NUM_MODES == torch.arange(NUM_CLASSES)[:, None]
    return Mixture(means, STD**2 * torch.eye(2), of_class / of_class.sum(1, keepdim=True))
