"""Sampling that ranks share out and that is timed. Each rank holds whole networks.

Batches are dealt to the ranks as they are cut for one: every video has the same bits on any number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from sgmd_dist import rng
from sgmd_dist.conditions import Condition
from sgmd_dist.models.base import LatentShape
from sgmd_dist.prompts import Prompts
from sgmd_dist.rollout import Network, guided, sample


@dataclass(frozen=True)
class Settings:
    """How videos come about: Euler steps on the grid of a time shift, guidance (1.0: none), and the noise's seed."""

    num_steps: int
    shift: float
    seed: int
    guidance_scale: float = 1.0


@dataclass
class Clock:
    """Seconds and network passes of the batches that a rank has sampled.

    Attributes:
        seconds: of each batch. videos: of each batch.
        passes: samples that went through the network, a guided step counted as two.
    """

    seconds: list[float] = field(default_factory=list)
    videos: list[int] = field(default_factory=list)
    passes: int = 0

    def per_video(self) -> tuple[float, float]:
        """Seconds of one rank and network passes, each per video, over all ranks. Collective.

        A rank's first batch, in which memory is allocated and kernels are chosen, counts only where it is the only one.
        """
        counted = slice(1, None) if len(self.videos) > 1 else slice(None)
        sums = torch.tensor(
            [sum(self.seconds[counted]), sum(self.videos[counted]), self.passes, sum(self.videos)], dtype=torch.float64
        )
        dist.all_reduce(sums)
        seconds, timed, passes, videos = sums.tolist()
        return seconds / timed, passes / videos


def shared_batches(count: int, batch_size: int) -> list[range]:
    """This rank's batches of `count` videos, by their numbers: every n-th of all, for n ranks."""
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return batches[dist.get_rank() :: dist.get_world_size()]


def sample_batches(
    network: Network,
    prompts: Prompts,
    latent_shape: LatentShape,
    batches: list[range],
    settings: Settings,
    device: torch.device,
    clock: Clock,
) -> Iterator[tuple[range, Tensor]]:
    """Latents `[B, C, F, H, W]` float32 on the CPU of each batch; video i depends on (seed, i) and caption i alone."""

    def counted(x: Tensor, sigma: Tensor, condition: Condition, level: float) -> Tensor:
        clock.passes += len(x)
        return network(x, sigma, condition, level)

    negative = prompts.negative.to(device)
    for numbers in batches:
        noise = torch.stack([rng.normal(latent_shape, settings.seed, "sample", i) for i in numbers]).to(device)
        _wait_for(device)
        start = time.perf_counter()
        velocity = guided(counted, prompts.condition(numbers, device), negative, settings.guidance_scale)
        latents = sample(velocity, noise, settings.num_steps, settings.shift)
        _wait_for(device)
        clock.seconds.append(time.perf_counter() - start)
        clock.videos.append(len(numbers))
        yield numbers, latents.cpu()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gathered(parts: Iterator[tuple[range, Tensor]], count: int, latent_shape: LatentShape) -> Tensor:
    """All ranks' batches as one tensor `[count, C, F, H, W]` on the CPU of every rank. Collective."""
    videos = torch.zeros(count, *latent_shape)
    for numbers, latents in parts:
        videos[numbers.start : numbers.stop] = latents
    dist.all_reduce(videos)  # each video is zero on all ranks but one
    return videos
