"""What a small world tells the comparison of objectives.

A world's module defines `build()`, which returns a `World`. The networks are plain modules, not sharded: what is
compared is mathematics, at the smallest cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from sgmd_dist.batch import Batch
from sgmd_dist.models.base import LatentShape, RunnableModel

REFERENCE_SEED = 1  # of the teacher samples that others are scored against


class World(Protocol):
    """A teacher whose samples are known, and how samples are scored against them.

    Attributes:
        name: the module's.
        latent_shape: (C, F, H, W).
        batch_size: samples of one optimizer step.
        guidance_scale: of the teacher.
        sigma_shift: of the chain and of the renoising levels.
        num_samples: how many are scored.
    """

    name: str
    latent_shape: LatentShape
    batch_size: int
    guidance_scale: float
    sigma_shift: float
    num_samples: int

    def networks(self) -> Mapping[str, tuple[nn.Module, RunnableModel]]:
        """New teacher, generator and fake_score; the latter two start as the teacher without guidance."""
        ...

    def batch(self, unit: int) -> Batch:
        """The training batch number `unit`, `batch_size` samples: a pure function of it. Its latents are real ones."""
        ...

    def prompts(self, count: int) -> tuple[Tensor, Tensor]:
        """Prompt embeddings `[count, T, D]` to score with, every prompt equally often, and the negative one
        `[1, T, D]`."""
        ...

    def teacher_samples(self, count: int, seed: int) -> Tensor:
        """Samples `[count, C, F, H, W]` of the guided teacher for `prompts(count)`, with many steps; kept where making
        them takes long."""
        ...

    def score(self, samples: Tensor, reference: Tensor) -> dict[str, float]:
        """Scores of samples for `prompts(N)` against teacher samples for the same prompts, `[N, C, F, H, W]` both.

        `swd` is among them: the quality that budgets are compared at, lower is better.
        """
        ...
