"""The interface between an objective and the training loop.

An objective's module defines `Section` (its part of a recipe) and `build(section)`, which returns an `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from sgmd_dist.batch import Batch
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import Gradient
from sgmd_dist.roles import Roles


@dataclass
class Losses:
    """What a micro-batch gives: the loss per sample with its graph, and values for the metrics; all are `[B]`."""

    per_sample: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class StepState:
    """What the phases of one optimizer step share.

    Attributes:
        step: optimizer step, from 0.
        seed: the run's seed.
        num_units: micro-batches per phase over all data-parallel ranks.
        fused: whether losses that have a fused kernel run it.
        unit_index: the current micro-batch's number in its phase, in {0, ..., num_units - 1}.
        samples: generated samples of this step by `unit_index`, detached, for phases that reuse them.
        batches: the batches they were generated from.
    """

    step: int
    seed: int
    num_units: int
    unit_index: int = 0
    fused: bool = False
    samples: dict[int, Tensor] = field(default_factory=dict)
    batches: dict[int, Batch] = field(default_factory=dict)

    def group(self, num_groups: int) -> int:
        """The exit group of the current micro-batch: units are cut into equal consecutive groups."""
        return self.unit_index * num_groups // self.num_units


@dataclass(frozen=True)
class Passes:
    """Forward passes of a role's network in one micro-batch, for plans.

    Attributes:
        role: whose network runs.
        gradient: what backward computes through them: nothing, the gradient of the network's input alone, or that of
            its weights (and of all activations between).
        mean, most: how many there are, in expectation and at most over the random draws.
        batch: samples in a pass per sample of the micro-batch.
    """

    role: str
    gradient: Gradient
    mean: float = 1.0
    most: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Phase:
    """One optimizer update: the role to train, its loss, where its batches come from, and the passes it takes.

    `data`: `next` takes the next units of the stream, `same` the batches that the step's first phase took.
    `passes`: of one micro-batch, in the order in which the loss runs them; graphs live until the loss is whole.
    """

    role: str
    loss: Callable[[Roles, Batch, StepState], Losses]
    data: Literal["next", "same"] = "next"
    passes: tuple[Passes, ...] = ()


class Objective(Protocol):
    """A training objective.

    Attributes:
        roles: each role that it needs, and whether the role is trained.
        needs_latents: the recipe's setting by which captions alone do not suffice, as in
            `objective.rollout = data`; None where they do.
        needs_pairs: the same for samples without the noise that a teacher made them of.
    """

    roles: dict[str, bool]
    needs_latents: str | None
    needs_pairs: str | None

    def phases(self, step: int) -> Sequence[Phase]:
        """The updates of optimizer step `step`, in order: cadence lives here and nowhere else."""
        ...


def latents_of(batch: Batch, setting: str | None) -> Tensor:
    """The batch's real latents in float32.

    Args:
        setting: the objective's `needs_latents`, for the message.

    Raises:
        UserError: the shards hold captions only.
    """
    if batch.latents is None:
        raise UserError(f"data.shards: {setting} needs latents, these shards hold captions only")
    return batch.latents.float()


def pairs_of(batch: Batch, setting: str | None) -> tuple[Tensor, Tensor]:
    """The batch's pairs in float32: noise, and what the teacher made of it.

    Args:
        setting: the objective's `needs_pairs`, for the message.

    Raises:
        UserError: the shards hold no pairs.
    """
    if batch.noise is None or batch.latents is None:
        raise UserError(f"data.shards: {setting} needs pairs, these shards hold none; make them by prepare.py pairs")
    return batch.noise.float(), batch.latents.float()


def per_sample_mean(x: Tensor) -> Tensor:
    """Mean over all dims but the batch: `[B, ...]` to `[B]`."""
    return x.flatten(1).mean(1)
