"""Network passes of an optimizer step, with what each costs a rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sgmd_dist.models.base import Gradient, PassCosts
from sgmd_dist.objectives.base import Passes


@dataclass(frozen=True)
class PlannedPasses:
    """Passes of one role with the costs of one of them. `of_adapter`: the role trains an adapter, whose own gradients
    are too small to count; its backward pass still keeps what those of whole weights need."""

    passes: Passes
    costs: PassCosts
    of_adapter: bool = False

    @property
    def computed(self) -> Gradient:
        """The gradient that the backward pass computes through the network."""
        return "input" if self.of_adapter and self.passes.gradient == "weights" else self.passes.gradient


@dataclass(frozen=True)
class PlannedPhase:
    """A phase's passes for one micro-batch, in their order."""

    role: str
    passes: tuple[PlannedPasses, ...]
    reuses_samples: bool


def sample_passes(phases: Sequence[PlannedPhase], *, recomputes: bool) -> dict[str, tuple[float, int]]:
    """Passes of a step per sample of the batch by role, (in expectation, at most): a forward, a recomputation and each
    kind of backward count 1, as in `Role.passes`."""
    counts: dict[str, tuple[float, int]] = {}
    for phase in phases:
        for planned in phase.passes:
            passes, each = planned.passes, planned.passes.batch * _passes_each(planned.computed, recomputes)
            mean, most = counts.get(passes.role, (0.0, 0))
            counts[passes.role] = (mean + each * passes.mean, most + each * passes.most)
    return counts


def _passes_each(gradient: Gradient, recomputes: bool) -> int:
    backward = {"none": 0, "input": 1, "weights": 2}[gradient]
    return 1 + backward + int(backward > 0 and recomputes)


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of a GPU in an optimizer step, recomputations included."""

    linear: float
    attention: float
    rest: float
    recomputed: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.rest + self.recomputed


def step_flops(phases: Sequence[PlannedPhase], *, checkpointing: str, accumulation: int) -> StepFlops:
    """FLOPs of a step: expected passes of all micro-batches."""
    linear = attention = rest = recomputed = 0.0
    for planned in _all_passes(phases):
        count, costs, gradient = planned.passes.mean * accumulation, planned.costs, planned.computed
        linear += count * (costs.linear.forward + costs.linear.backward(gradient))
        for part in (costs.self_attention, costs.cross_attention):
            attention += count * (part.forward + part.backward(gradient))
        rest += count * (costs.rest.forward + costs.rest.backward(gradient))
        if gradient != "none":
            recomputed += count * recomputed_flops(costs, checkpointing)
    return StepFlops(linear, attention, rest, recomputed)


def recomputed_flops(costs: PassCosts, checkpointing: str) -> float:
    """What a backward pass computes again: blocks, without their self-attention where it is kept."""
    if checkpointing == "none":
        return 0.0
    rest = costs.linear.forward + costs.cross_attention.forward
    return rest + (costs.self_attention.forward if checkpointing == "block" else 0.0)


def _all_passes(phases: Sequence[PlannedPhase]) -> Iterator[PlannedPasses]:
    for phase in phases:
        yield from phase.passes
