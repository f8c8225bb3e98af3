"""Everything about a run that can be checked before a GPU is taken, and the plan of the run as text."""

from __future__ import annotations

import torch

from sgmd_dist import resume
from sgmd_dist.assemble import build_model, build_objective
from sgmd_dist.data.sources import check_sources
from sgmd_dist.recipe import Layout, Recipe

GIB = 2**30


def check(recipe: Recipe, layout: Layout) -> list[str]:
    """Check folders, configurations and data; returns the plan, a line each. Allocates no weights.

    Raises:
        UserError: the first thing that is wrong.
    """
    objective = build_objective(recipe)
    models = {role: build_model(recipe, role) for role in objective.roles}
    check_sources(recipe, models["generator"], objective.needs_latents)
    resume.decide(recipe)
    lines = [
        f"recipe      {recipe.run.name}: {recipe.objective.name} on {recipe.model.family}, {recipe.run.steps} steps",
        f"ranks       {layout.world_size} = dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard}"
        f" x ring {layout.ring} x ulysses {layout.ulysses}",
        f"batch       global {recipe.data.global_batch_size} = micro {recipe.data.micro_batch_size}"
        f" x data parallel {layout.dp_size} x accumulation {layout.accumulation}",
        f"updates     {', '.join(phase.role for phase in objective.phases(0))} per step",
    ]
    shard_ranks = layout.dp_shard * layout.sequence_size
    for role, model in models.items():
        trained = objective.roles[role]
        with torch.device("meta"):
            num_parameters = sum(p.numel() for p in model.build().parameters())
        size = _bytes_per_parameter(recipe, role, trained) * num_parameters / shard_ranks
        state = "trained" if trained else "frozen"
        lines.append(f"{role:<11} {num_parameters / 1e9:.4f} B parameters, {state}, {size / GIB:.3f} GiB per rank")
    return lines


def _bytes_per_parameter(recipe: Recipe, role: str, trained: bool) -> int:
    """Weights; for a trained role also gradient and two moments in float32, for the generator its EMA."""
    weight = 2 if recipe.model.for_role(role).dtype == "bfloat16" else 4
    return weight + trained * (4 + 4 + 4) + (trained and role == "generator") * 4
