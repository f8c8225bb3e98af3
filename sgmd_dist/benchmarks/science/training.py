"""One training of a small world: an objective's phases on plain networks, scored while the passes are counted."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgmd_dist import flow, registry, rng
from sgmd_dist.benchmarks.science.base import REFERENCE_SEED, World
from sgmd_dist.objectives._distillation import Distillation
from sgmd_dist.objectives.base import Phase, StepState
from sgmd_dist.recipe import AdamWSection, OptimSection
from sgmd_dist.roles import Roles, build_roles
from sgmd_dist.rollout import backward_simulation, guided

_SAMPLE_SEED = 3
_CHUNK = 64
_LAST_PART = 0.25  # of a training, over which metrics are averaged


@dataclass(frozen=True)
class Method:
    """An objective with its keys.

    Attributes:
        name: in tables.
        objective: keys of a recipe's `objective` section; world and student fill in guidance and shift.
        lr_ratio: learning rate of the fake score over the generator's.
        leaks: the generator phase's gradients of the fake score's weights are added to the fake score's next update,
            as FSDP2 does where a trainer only turns their synchronization off (an ablation: a mistake on purpose).
    """

    name: str
    objective: dict[str, Any]
    lr_ratio: float = 1.0
    leaks: bool = False


@dataclass(frozen=True)
class Point:
    """A training's state: network passes per sample and CPU seconds so far, evaluation apart, and its scores."""

    steps: int
    passes: float
    cpu_s: float
    scores: dict[str, float]


@dataclass
class Curve:
    """One training.

    Attributes:
        metrics: the objective's own, averaged over the last quarter of the steps.
        exits: scores of the samples at each exit of the chain, at the end.
        diverged: the scores were not finite; the training ended there.
    """

    world: str
    method: str
    lr: float
    seed: int
    points: list[Point] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    exits: list[dict[str, float]] = field(default_factory=list)
    diverged: bool = False

    def within(self, *, passes: float = math.inf, cpu_s: float = math.inf) -> list[Point]:
        """The points inside a budget."""
        return [point for point in self.points if point.passes <= passes and point.cpu_s <= cpu_s]

    def best(self, name: str = "swd", *, passes: float = math.inf, cpu_s: float = math.inf) -> Point:
        """The point of the lowest score inside a budget: where an early stop would end."""
        return min(self.within(passes=passes, cpu_s=cpu_s), key=lambda point: point.scores[name])

    def anytime(self) -> float:
        """The best swd so far, averaged over the training: low where a method is good, and soon."""
        best = [self.best(passes=point.passes).scores["swd"] for point in self.points]
        return sum(best) / len(best)

    def first_below(self, target: float, name: str = "swd") -> Point | None:
        """The first point whose score reaches `target`, or None."""
        return next((point for point in self.points if point.scores[name] <= target), None)


class Training:
    """A method in a world, step by step. Two trainings of the same seed see the same noise.

    Args:
        lr: of the generator.
        seed: of every draw.
        num_samples, num_reference: that are scored, and of the teacher; None for the world's own numbers.
    """

    def __init__(
        self,
        world: World,
        method: Method,
        lr: float,
        seed: int,
        num_samples: int | None = None,
        num_reference: int | None = None,
    ) -> None:
        self.world, self.method, self.seed = world, method, seed
        self.objective = make_objective(world, method)
        adamw = {"betas": (0.0, 0.999), "weight_decay": 0.01}
        optim = OptimSection.model_validate(
            {"generator": {"lr": lr, **adamw}, "fake_score": {"lr": lr * method.lr_ratio, **adamw}}
        )
        assert isinstance(optim.generator, AdamWSection)
        trained = {name for name, is_trained in self.objective.roles.items() if is_trained}
        networks = {name: network for name, network in world.networks().items() if name in self.objective.roles}
        self.roles = build_roles(networks, trained, optim, num_steps=1, recomputes=False)
        self.curve = Curve(world.name, method.name, lr, seed)
        self._embeds, self._negative = world.prompts(num_samples or world.num_samples)
        self._reference = world.teacher_samples(num_reference or world.num_reference, REFERENCE_SEED)
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)
        self.steps, self.passes, self.cpu_s, self._unit = 0, 0.0, 0.0, 0

    def run(self, max_passes: float, num_points: int) -> Curve:
        """Train until `max_passes` network passes per sample are spent, scored so many times on the way."""
        self._score()
        for number in range(1, num_points + 1):
            while self.passes < max_passes * number / num_points:
                self._step()
            self._score()
            if self.curve.diverged:
                return self.curve
        last = {name: values[-math.ceil(_LAST_PART * len(values)) :] for name, values in self._metrics.items()}
        self.curve.metrics = {name: sum(values) / len(values) for name, values in last.items()}
        self.curve.exits = [self._scores(exit_index) for exit_index in range(self.objective.section.student_steps)]
        return self.curve

    def _step(self) -> None:
        begun = time.process_time()
        state = StepState(self.steps, self.seed, num_units=1)
        phases = self.objective.phases(self.steps)
        for phase in phases:
            self._train_phase(phase, state)
        self.steps += 1
        self.cpu_s += time.process_time() - begun
        self.passes += sum(self.roles.take_passes().values()) / self.world.batch_size

    def _train_phase(self, phase: Phase, state: StepState) -> None:
        self.roles.train_only(phase.role)
        if self.method.leaks and phase.role == "generator":
            self.roles["fake_score"].set_requires_grad(True)
        if phase.data == "next":
            state.batches[0] = self.world.batch(self._unit)
            self._unit += 1
        losses = phase.loss(self.roles, state.batches[0], state)
        losses.per_sample.mean().backward()
        for name, value in losses.metrics.items():
            self._metrics[name].append(float(value.mean()))
        self.roles.step(phase.role, self.steps)

    def _score(self) -> None:
        scores = self._scores(self.objective.section.student_steps - 1)
        self.curve.points.append(Point(self.steps, self.passes, self.cpu_s, scores))
        self.curve.diverged = not all(map(math.isfinite, scores.values()))

    def _scores(self, exit_index: int) -> dict[str, float]:
        """Scores of the generator's samples that leave the chain at a step; the last is the one that is deployed."""
        samples = few_step_samples(
            self.roles, self._embeds, self._negative, self.objective.sigmas, exit_index, self.world.latent_shape
        )
        return self.world.score(samples, self._reference)


def make_objective(world: World, method: Method) -> Distillation:
    """The method's objective with the world's guidance and shift, from the recipe's own section."""
    module = registry.load(registry.OBJECTIVES, method.objective["name"])
    keys = {"guidance_scale": world.guidance_scale, "sigma_shift": world.sigma_shift} | method.objective
    return module.build(module.Section.model_validate(keys))


@torch.no_grad()
def few_step_samples(
    roles: Roles,
    embeds: Tensor,
    negative: Tensor,
    sigmas: list[float],
    exit_index: int,
    shape: tuple[int, int, int, int],
) -> Tensor:
    """The generator's samples `[N, C, F, H, W]` for N prompts, from noise that does not depend on the training."""
    roles.train_only(None)
    generator = roles["generator"].run  # scoring is not counted among the passes
    noise = torch.stack([rng.normal(shape, _SAMPLE_SEED, "science_sample", i) for i in range(len(embeds))])
    made = []
    for x, e in zip(noise.split(_CHUNK), embeds.split(_CHUNK), strict=True):
        velocity: flow.Velocity = guided(generator, e, negative, 1.0)
        made.append(backward_simulation(velocity, x, sigmas, exit_index))
    return torch.cat(made)
