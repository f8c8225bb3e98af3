"""A generator before and after distillation, scored against its teacher and real videos on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from sgmd_dist.assemble import Which
from sgmd_dist.evaluation import Scores, score
from sgmd_dist.prompts import Prompt, encode_together, encoders_of
from sgmd_dist.protocol import Protocol
from sgmd_dist.rollout import Network
from sgmd_dist.sampling import Source
from sgmd_dist.shares import Clock, Settings, gathered, sample_batches, shared_batches

COLUMNS = ("before", "after", "teacher")
HEADLINE = ("swd", "motion_ratio", "speed_ratio", "jitter")
DETAILS = (
    "consistency",
    "frame_colour_drift",
    "energy",
    "swd_real",
    "energy_real",
    "seconds_per_video",
    "passes_per_video",
)
TIMED = "seconds_per_video"  # the one number that differs from call to call


@dataclass(frozen=True)
class Row:
    """Scores of one column, with the seconds and network passes that a video takes one rank."""

    scores: Scores
    seconds_per_video: float
    passes_per_video: float

    def as_dict(self) -> dict[str, float]:
        speed = {TIMED: self.seconds_per_video, "passes_per_video": self.passes_per_video}
        return {**self.scores.as_dict(), **speed}


@dataclass
class Comparison:
    """Latents `[N, C, F, H, W]` of each column and, on the main rank, its row."""

    protocol: Protocol
    videos: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """`scores[column][name]`, as scores.json holds them."""
        return {name: self.rows[name].as_dict() for name in COLUMNS if name in self.rows}


def table(scores: Mapping[str, Mapping[str, float]], names: tuple[str, ...]) -> str:
    """Those of the scores that there are, as text: a row per column of the comparison."""
    names = tuple(name for name in names if any(name in row for row in scores.values()))
    width = max(9, *(len(label) + 1 for label in scores))
    lines = [" " * width + "".join(f"{name:>{_width(name)}}" for name in names)]
    for label, row in scores.items():
        cells = (f"{row[name]:.3f}" if name in row else "" for name in names)
        lines.append(f"{label:<{width}}" + "".join(f"{c:>{_width(n)}}" for n, c in zip(names, cells, strict=True)))
    return "\n".join(lines)


def _width(name: str) -> int:
    return max(14, len(name) + 2)


def side_by_side(
    here: Mapping[str, Mapping[str, float]], there: Mapping[str, Mapping[str, float]]
) -> dict[str, Mapping[str, float]]:
    """The rows of two evaluations of one protocol, each above its counterpart."""
    rows: dict[str, Mapping[str, float]] = {}
    for name in COLUMNS:
        rows[name] = here[name]
        if name in there:
            rows[f"{name}, against"] = there[name]
    return rows


def compare(
    source: Source,
    protocol: Protocol,
    prompts: Sequence[Prompt],
    which: Which,
    device: torch.device,
    *,
    real: Tensor | None = None,
    batch_size: int = 32,
) -> Comparison:
    """Sample and score: `before` is the network that the generator started from, `after` the trained one, both with
    few steps and no guidance; `teacher` is the guided teacher from the same noise, with which it scores the floor: the
    reference is the guided teacher from other noise. Collective; each rank holds one whole network at a time.

    Args:
        prompts: of the protocol; those of the main rank count.
        real: videos `[M, C, F, H, W]` for the main rank, or None.
    """
    encoded = encode_together(
        encoders_of(source.recipe, source.model, "--prompts"), lambda: prompts, device, "--prompts"
    )
    repeated = encoded.repeated(protocol.repeats)
    shift, seed = protocol.sigma_shift, protocol.sample_seed
    few = Settings(protocol.student_steps, shift, seed)
    many = Settings(protocol.teacher_steps, shift, seed, protocol.guidance_scale)
    reference_settings = Settings(protocol.teacher_steps, shift, protocol.reference_seed, protocol.guidance_scale)

    def sampled(network: Network, settings: Settings) -> tuple[Tensor, tuple[float, float]]:
        count, clock = len(repeated.captions), Clock()
        batches = shared_batches(count, batch_size)
        parts = sample_batches(network, repeated, protocol.latent_shape, batches, settings, device, clock)
        return gathered(parts, count, protocol.latent_shape), clock.per_video()

    teacher = source.teacher(device)
    reference, _ = sampled(teacher, reference_settings)
    found = {"teacher": sampled(teacher, many)}
    del teacher
    found["before"] = sampled(source.beginning(device), few)
    found["after"] = sampled(source.network(which, device), few)
    result = Comparison(protocol, {name: found[name][0] for name in COLUMNS})
    if dist.get_rank() == 0:
        result.rows = {name: Row(score(result.videos[name], reference, real), *found[name][1]) for name in COLUMNS}
    return result
