"""Optimizer steps without weights, data or memory: one rank at a time on a fake process group, with fake tensors.

Every decision that may depend on the rank, every shape and every collective is that of a run, as its own code makes
them: the networks are parallelized, the roles trained and the metrics reduced as by the trainer. Only weights and
samples are not there, and so no numbers. The device is a CPU: fused kernels and compilation are those of a CPU.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from sgmd_dist.assemble import (
    build_architecture,
    build_meta_network,
    build_objective,
    is_offloaded,
    materialize,
    networks_by_role,
    plan_networks,
)
from sgmd_dist.batch import Batch
from sgmd_dist.data.sources import latent_shape_of
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import ImageInput, LatentShape, RunnableModel
from sgmd_dist.objectives.base import Phase, StepState
from sgmd_dist.parallel.mesh import Mesh, build_mesh
from sgmd_dist.parallel.sequence import compare
from sgmd_dist.planner.machine import GIB, Machine
from sgmd_dist.planner.plan import make_plan
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.rng import SampleId
from sgmd_dist.stepper import Stepper
from sgmd_dist.tracing import CATEGORIES, Collective, Part, Tracer

STEPS = 2  # the optimizers' moments come to be in the first


@dataclass(frozen=True)
class RankTrace:
    """What one rank did, phase by phase, and how long its dry run took."""

    rank: int
    parts: list[Part]
    seconds: float

    @property
    def last_step(self) -> list[Part]:
        """The phases of the last step, with everything in memory that a run holds."""
        return [part for part in self.parts if part.name.startswith(f"step {STEPS},")]


def chosen_ranks(world_size: int) -> list[int]:
    """Ranks that stand for all: the first two, the last, and the one before the middle."""
    return sorted({0, min(1, world_size - 1), max(world_size // 2 - 1, 0), world_size - 1})


def dry_run(recipe_path: str, overrides: Sequence[str], world_size: int, ranks: Sequence[int]) -> list[RankTrace]:
    """Trace `ranks` of `world_size`, each in a process of its own, as many at a time as there are cores.

    Raises:
        UserError: the recipe cannot be run so.
    """
    workers = min(len(ranks), os.cpu_count() or 1)
    context = multiprocessing.get_context("forkserver")  # a fake process group is the process's only one
    context.set_forkserver_preload([__name__])  # imported once, for all ranks
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(_trace_quietly, recipe_path, list(overrides), world_size, rank) for rank in ranks]
        return [future.result() for future in futures]


def trace(recipe: Recipe, world_size: int, rank: int) -> RankTrace:
    """Take two optimizer steps as `rank` of `world_size`, in this process, which has no process group and traces once:
    torch's caches remember groups.

    Raises:
        UserError: the recipe does not fit so many ranks, or its architecture is not known.
    """
    start = time.perf_counter()
    layout, objective = recipe.layout(world_size), build_objective(recipe)
    plans = plan_networks(recipe, objective.roles, build_architecture)
    generator = next(plan.model for plan in plans if "generator" in plan.roles)
    latent_shape = latent_shape_of(recipe, generator)
    tracer = Tracer()
    with _fake_process_group(world_size, rank):
        mesh = build_mesh(layout, torch.device("cpu"))
        modules = [build_meta_network(recipe, mesh, plan) for plan in plans]
        with FakeTensorMode(allow_non_fake_inputs=True), tracer:  # noise is drawn, and then faked
            for module, plan in zip(modules, plans, strict=True):
                offload = is_offloaded(recipe, plan)
                materialize(module, plan.model, mesh.device, offload=offload)
                tracer.assign("host" if offload else "parameters", module.parameters())
                tracer.assign("parameters", module.buffers())
            networks = networks_by_role(modules, plans, objective.roles)
            has_noise = objective.needs_pairs is not None
            has_latents = has_noise or objective.needs_latents is not None
            batches = FakeBatches(recipe, mesh, latent_shape, generator, with_latents=has_latents, with_noise=has_noise)
            stepper = _TracedStepper(recipe, mesh, objective, networks, batches)
            stepper.trace(tracer)
    return RankTrace(rank, tracer.parts, time.perf_counter() - start)


def first_difference(traces: Sequence[RankTrace]) -> str | None:
    """Where ranks stop to issue the same collectives to groups of one kind in one order; None where they never do.

    Members of a group that disagree about a call's kind, shape or dtype hang; so may ranks that call two groups in
    different orders.
    """
    first = traces[0]
    for other in traces[1:]:
        for mine, theirs in _aligned(first.parts, other.parts):
            name = (mine or theirs).name  # pyright: ignore[reportOptionalMemberAccess]
            calls = _aligned(mine.collectives if mine else [], theirs.collectives if theirs else [])
            for number, (one, two) in enumerate(calls, start=1):
                if one != two:
                    return (
                        f"ranks {first.rank} and {other.rank} part at collective {number} of {name}: rank {first.rank}"
                        f" issues {one or 'none'}, rank {other.rank} {two or 'none'}"
                    )
    return None


def check_equal(traces: Sequence[RankTrace]) -> None:
    """Refuse a recipe whose ranks would wait for one another forever.

    Raises:
        UserError: the ranks' collectives differ; the message has the first difference.
    """
    difference = first_difference(traces)
    if difference is not None:
        raise UserError(
            f"dry run: {difference}; such a run hangs; what decides which network runs, and on which shapes, must be"
            " equal on all ranks"
        )


def planned_bytes(recipe: Recipe, world_size: int) -> int:
    """The peak that the planner expects of a run on CPUs, where torch has no kernel for norms.

    Raises:
        UserError: the recipe does not fit so many ranks, or its architecture is not known.
    """
    return make_plan(recipe, Machine(1, world_size, gpu_memory=0.0, fused_norms=False)).peak_bytes


def report(traces: Sequence[RankTrace], world_size: int, planned: int) -> list[str]:
    """Collectives of the last step and bytes at the peak of its phases, largest of the traced ranks; a line each.

    Args:
        planned: the planner's peak of the whole step, in bytes.
    """
    ranks = ", ".join(str(t.rank) for t in traces)
    slowest = max(t.seconds for t in traces)
    lines = [f"dry run     {STEPS} steps on {world_size} ranks, as rank {ranks} sees them, {slowest:.0f} s at most"]
    calls = [call for part in traces[0].last_step for call in part.collectives]
    lines.append(f"collectives {len(calls)} in a step{': the same on these ranks' if len(traces) > 1 else ''}")
    lines += [f"  {text}" for text in _collective_lines(calls)]
    lines.append(f"peak        GiB of a rank in   {' '.join(f'{name:>12}' for name in (*CATEGORIES, 'in all'))}")
    for parts in zip(*(t.last_step for t in traces), strict=True):
        largest = max(parts, key=lambda part: part.peak_bytes)
        numbers = [*(largest.peak[category] for category in CATEGORIES), largest.peak_bytes]
        lines.append(f"  {largest.name:<28} {' '.join(f'{number / GIB:12.3f}' for number in numbers)}")
    lines.append(f"planned     {planned / GIB:.3f} GiB at the peak, by launch/plan.py's formulas for a CPU")
    return lines


def _collective_lines(calls: Sequence[Collective]) -> Iterator[str]:
    """Calls and bytes by kind, group and dtype."""
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for call in calls:
        key = (call.kind.strip("_"), str(call.group), call.dtypes[-1] if call.dtypes else "")
        counts[key] += 1
        sizes[key] += call.num_bytes
    for key, count in counts.items():
        yield f"{count:6d} {key[0]} over {key[1]}, {key[2]}: {sizes[key] / GIB:.3f} GiB"


def _aligned(one: Sequence[Any], two: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return itertools.zip_longest(one, two)


class FakeBatches:
    """Batches as the stream's, without data: every sample is there and none has a value."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        latent_shape: LatentShape,
        model: RunnableModel,
        *,
        with_latents: bool,
        with_noise: bool = False,
    ) -> None:
        self._size, self._tokens = recipe.data.micro_batch_size, recipe.model.text_tokens
        self._unit, self._dp_size, self._group = mesh.dp_rank, mesh.dp_size, mesh.sequence
        self._latent_shape, self._text_dim, self._image = latent_shape, model.text_dim(), model.image_input
        self._with_latents, self._with_noise = with_latents, with_noise

    def next(self) -> Batch:
        unit, size, image = self._unit, self._size, self._image
        self._unit += self._dp_size
        valid = torch.ones(size, dtype=torch.bool)
        if self._group is not None:
            compare(valid, unit, self._group)
        return Batch(
            ids=tuple(SampleId(0, unit, row) for row in range(size)),
            keys=tuple(f"{unit}/{row}" for row in range(size)),
            latent_shape=self._latent_shape,
            prompt_embeds=torch.empty(size, self._tokens, self._text_dim, dtype=torch.bfloat16),
            negative_embeds=torch.empty(1, self._tokens, self._text_dim, dtype=torch.bfloat16),
            latents=self._video() if self._with_latents else None,
            valid=valid,
            noise=self._video() if self._with_noise else None,
            condition_latents=None if image is None else self._video(),
            image_embeds=None if image is None or not image.embed_dim else self._embeds(image),
        )

    def _video(self) -> Tensor:
        return torch.empty(self._size, *self._latent_shape, dtype=torch.bfloat16)

    def _embeds(self, image: ImageInput) -> Tensor:
        return torch.empty(self._size, image.num_embeds, image.embed_dim, dtype=torch.bfloat16)


class _TracedStepper(Stepper):
    """Tells a tracer which phase it is in, and what its tensors are for."""

    def trace(self, tracer: Tracer) -> None:
        self._tracer = tracer
        for role in self.roles.trained:
            tracer.assign("ema", role.ema.shadow.values() if role.ema else ())
        for _ in range(STEPS):
            self.train_step()
            tracer.begin(f"the end of step {self.step}")
            self.take_scalars()

    def _train_phase(self, phase: Phase, state: StepState) -> None:
        self._tracer.begin(f"step {state.step + 1}, {phase.role}")
        super()._train_phase(phase, state)
        optimizer = self.roles[phase.role].optimizer
        assert optimizer is not None
        moments = [tensor for moment in optimizer.state.values() for tensor in moment.values()]
        self._tracer.assign("optimizer", moments)


def _trace_quietly(recipe_path: str, overrides: list[str], world_size: int, rank: int) -> RankTrace:
    logger.disable("sgmd_dist")
    torch.set_num_threads(1)
    return trace(load_recipe(recipe_path, overrides), world_size, rank)


@contextmanager
def _fake_process_group(world_size: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
