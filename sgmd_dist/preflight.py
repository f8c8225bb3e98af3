"""Everything about a run that can be checked before a GPU is taken, and the plan of the run as text."""

from __future__ import annotations

from pathlib import Path

from sgmd_dist import health, profiling, resume, training_samples, wandb_run
from sgmd_dist.assemble import build_objective, plan_networks
from sgmd_dist.data.sources import check_sources, latent_shape_of
from sgmd_dist.durable import check_writable
from sgmd_dist.errors import UserError
from sgmd_dist.layout import Layout
from sgmd_dist.models.base import VideoModel
from sgmd_dist.parallel.sequence import Partition, Traffic, traffic
from sgmd_dist.planner.machine import GIB, knobs_of
from sgmd_dist.planner.weights import all_role_bytes, networks_of
from sgmd_dist.recipe import Recipe
from sgmd_kernels.attention import AUTO, unfit_everywhere

MIB = 2**20


def check(recipe: Recipe, layout: Layout) -> list[str]:
    """Check folders, configurations and data; returns the plan, a line each. Allocates no weights.

    Raises:
        UserError: the first thing that is wrong.
    """
    objective = build_objective(recipe)
    plans = plan_networks(recipe, objective.roles)
    generator = next(plan.model for plan in plans if "generator" in plan.roles)
    check_sources(recipe, generator, objective.needs_latents, objective.needs_pairs)
    health.check(recipe)
    wandb_run.check(recipe)
    profiling.check(recipe, layout)
    training_samples.check(recipe)
    check_writable(Path(recipe.run.dir), f"run.dir = '{recipe.run.dir}'")
    resume.decide(recipe)
    _check_attention(recipe, generator)
    lines = [
        f"recipe      {recipe.run.name}: {recipe.objective.name} on {recipe.model.family}, {recipe.run.steps} steps",
        f"ranks       {layout.world_size} = dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard}"
        f" x ring {layout.ring} x ulysses {layout.ulysses}",
        f"batch       global {recipe.data.global_batch_size} = micro {recipe.data.micro_batch_size}"
        f" x data parallel {layout.dp_size} x accumulation {layout.accumulation}",
        f"updates     {', '.join(phase.role for phase in objective.phases(0))} per step",
        *_sequence_lines(recipe, layout, generator),
    ]
    loras = {role: lora for plan in plans for role, lora in plan.loras.items()}
    networks = networks_of(plans, layout)
    for planned in all_role_bytes(objective.roles, networks, knobs_of(recipe)).values():
        count, state = planned.num_parameters / 1e9, "trained" if objective.roles.get(planned.role) else "frozen"
        what = f" of an adapter of rank {loras[planned.role].rank}" if planned.role in loras else ""
        lines.append(
            f"{planned.role:<11} {count:.4f} B parameters{what}, {state}, {planned.total / GIB:.3f} GiB per rank"
        )
    return lines


def _check_attention(recipe: Recipe, model: VideoModel) -> None:
    """Refuse a backend that no device could run; whether this run's devices have it, only they can tell."""
    backend, head_size = recipe.parallel.attention, model.attention_shape().head_size
    reason = None if backend == AUTO else unfit_everywhere(backend, model.compute_dtype, head_size)
    if reason is not None:
        raise UserError(
            f"parallel.attention = {backend}: {reason}; this model has model.compute_dtype ="
            f" {recipe.model.compute_dtype} and head size {head_size}; choose another backend, or auto"
        )


def _sequence_lines(recipe: Recipe, layout: Layout, model: VideoModel) -> list[str]:
    """How a video's tokens lie on the ranks that share them, and what these exchange in each block."""
    latent_shape, shape = latent_shape_of(recipe, model), model.attention_shape()
    part = Partition(model.num_tokens(latent_shape), layout.ring, layout.ulysses)
    heads = -(-shape.num_heads // part.ulysses)
    waste = part.padding / (part.run * part.size)
    head_waste = 1 - shape.num_heads / (heads * part.ulysses)
    lines = [
        f"tokens      {part.length} of latents {'x'.join(map(str, latent_shape))}: {part.run} per rank on {part.size},"
        f" padding {waste:.2%}; {shape.num_heads} heads: {heads} per rank on {part.ulysses}, padding {head_waste:.2%}"
    ]
    if part.size > 1:
        forward, backward = traffic(
            part,
            batch=recipe.data.micro_batch_size,
            heads=shape.num_heads,
            head_size=shape.head_size,
            item_bytes=model.compute_dtype.itemsize,
        )
        lines.append(
            f"exchange    sent by a rank in each of {shape.num_blocks} blocks for a micro-batch: forward"
            f" {_sent(forward)}, backward {_sent(backward)}; batched guidance doubles the teacher's"
        )
    return lines


def _sent(sent: Traffic) -> str:
    calls = [f"{sent.all_to_alls} all-to-alls"] * (sent.all_to_alls > 0) + [
        f"{sent.hops} hop{'s' * (sent.hops > 1)}"
    ] * (sent.hops > 0)
    return f"{sent.sent_bytes / MIB:.3f} MiB ({', '.join(calls)})"
