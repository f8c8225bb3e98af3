"""Tracks of a point over 8 frames, with modes of different speeds; latents `[2, 8, 1, 1]`, channels x and y.

Frame f is at start + f speed direction + noise. The prompt names the direction; start and speed are not in it, so that
a generator that averages over what the prompt leaves open moves too slowly, or at one speed only. Prompted or not, this
is a Gaussian mixture: three speeds a direction, with the start's covariance of rank two.
"""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor

from sgmd_dist.benchmarks.science import scores
from sgmd_dist.benchmarks.science.exact import Mixture, MixtureWorld

NUM_FRAMES = 8
NUM_DIRECTIONS = 4
SPEEDS = (0.15, 0.35, 0.55)  # per frame
SPEED_WEIGHTS = (0.5, 0.3, 0.2)
FAST = (SPEEDS[-2] + SPEEDS[-1]) / 2
START_STD = 0.5
NOISE_STD = 0.08


def build() -> Trajectories:
    """The world."""
    return Trajectories()


class Trajectories(MixtureWorld):
    """See the module."""

    def __init__(self) -> None:
        super().__init__(
            "trajectories",
            (2, NUM_FRAMES, 1, 1),
            _mixture(),
            batch_size=128,
            guidance_scale=2.0,
            sigma_shift=5.0,
            num_samples=2048,
        )

    def score(self, samples: Tensor, reference: Tensor) -> dict[str, float]:
        """The mixture's scores, and those of the motion, which is a track's velocity by least squares.

        speed_ratio: mean speed over the reference's. speed_distance: 1-Wasserstein distance of the speeds, mean over
        the prompts. fast_ratio: share of tracks of the fastest mode over the reference's. jitter_ratio: second
        differences over time relative to the reference's.
        """
        tracks, wanted = (x[..., 0, 0].transpose(1, 2) for x in (samples, reference))
        speeds, wanted_speeds = (scores.slope(x).norm(dim=1) for x in (tracks, wanted))
        pairs = zip(self.by_prompt(speeds), self.by_prompt(wanted_speeds), strict=True)
        return {
            **super().score(samples, reference),
            "speed_ratio": float(speeds.mean() / wanted_speeds.mean()),
            "speed_distance": fmean(scores.wasserstein_1d(a, b) for a, b in pairs),
            "fast_ratio": float((speeds > FAST).double().mean() / (wanted_speeds > FAST).double().mean()),
            "jitter_ratio": scores.jitter(tracks) / scores.jitter(wanted),
        }


def _mixture() -> Mixture:
    angles = 2 * math.pi * torch.arange(NUM_DIRECTIONS, dtype=torch.float64) / NUM_DIRECTIONS
    directions = torch.stack([angles.cos(), angles.sin()], 1)
    frames = torch.arange(NUM_FRAMES, dtype=torch.float64) - (NUM_FRAMES - 1) / 2
    speeds = torch.tensor(SPEEDS, dtype=torch.float64)
    means = torch.einsum("pc,s,f->pscf", directions, speeds, frames).flatten(2).flatten(0, 1)
    same_start = torch.kron(torch.eye(2), torch.ones(NUM_FRAMES, NUM_FRAMES)).double()
    covariance = START_STD**2 * same_start + NOISE_STD**2 * torch.eye(2 * NUM_FRAMES)
    weights = torch.kron(torch.eye(NUM_DIRECTIONS), torch.tensor([SPEED_WEIGHTS]))
    return Mixture(means, covariance, weights)
