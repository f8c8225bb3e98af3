"""The planner's bytes and passes against real ranks: what their shards hold, and what a step sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.tensor import DTensor

from sgmd_dist.adapters import base_parameters
from sgmd_dist.objectives._distillation import Distillation
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.planner.machine import Machine
from sgmd_dist.planner.plan import make_plan
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.roles import Role, Roles
from sgmd_dist.trainer import Trainer

ADAPTERS = ["model.generator.lora.rank=3", "model.fake_score.lora.rank=2"]
NO_CHANCE = "objective.student_steps=1"  # one exit: what a step sends is one number


def two_each(world_size: int) -> str:
    """The override by which each of so many data-parallel ranks takes two micro-batches a step."""
    return f"data.global_batch_size={2 * world_size}"


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def own_parameters(role: Role) -> Iterable[torch.Tensor]:
    """What is the role's own: its adapter, or its network, on which adapters of other roles may hang."""
    return (role.parameters if role.adapter else base_parameters(role.module)).values()


def state_bytes(recipe_path: Path, overrides: list[str]) -> dict[str, dict[str, int]]:
    """Bytes of this rank's shards in a step, by role."""
    recipe = load_recipe(recipe_path, [two_each(world_size()), *overrides])
    gradients: dict[str, int] = {}
    step = Roles.step

    def measured(roles: Roles, name: str, number: int) -> torch.Tensor:
        gradients[name] = local_bytes(p.grad for p in roles[name].parameters.values() if p.grad is not None)
        return step(roles, name, number)

    Roles.step = measured
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        trainer.train_step()
        found = {
            name: {
                "parameters": local_bytes(own_parameters(role)),
                "gradients": gradients.get(name, 0),
                "moments": sum(local_bytes(s.values()) for s in role.optimizer.state.values()) if role.optimizer else 0,
                "ema": local_bytes(role.ema.shadow.values()) if role.ema else 0,
                "buffers": local_bytes(role.module.buffers()) if role.adapter is None else 0,
            }
            for name, role in trainer.roles.items()
        }
        trainer.close()
        del trainer
    return found


@pytest.mark.parametrize(
    "world_size, overrides",
    [(2, []), (4, ["parallel.dp_replicate=2"]), (4, []), (4, ADAPTERS), (2, [*ADAPTERS, "model.fake_score.lora=null"])],
)
def test_state_bytes_of_the_fullest_rank_are_exact(recipe_path: Path, world_size: int, overrides: list[str]) -> None:
    """Tables of one row and widths that do not divide: some ranks hold more of a tensor than others."""
    ranks = run_ranks(world_size, state_bytes, recipe_path, overrides)
    for planned in make_plan(load_recipe(recipe_path, [two_each(world_size), *overrides]), Machine(1, world_size, 80)).roles:
        for part in ("parameters", "gradients", "moments", "ema", "buffers"):
            assert max(rank[planned.role][part] for rank in ranks) == getattr(planned, part), (planned.role, part)


def sent_bytes(recipe_path: Path, overrides: list[str]) -> dict[str, float]:
    """What this rank sends in a step, by the formulas of a ring, from the tensors that the collectives take."""
    sent: Counter[str] = Counter()

    def count(kind: str, collective: Any) -> Any:
        def counted(*args: Any, group: Any = None, **options: Any) -> Any:
            tensors = [t for t in (*args, *options.values()) if isinstance(t, torch.Tensor)]
            sent[kind] += min(t.nbytes for t in tensors) * (dist.get_world_size(group) - 1)
            return collective(*args, group=group, **options)

        return counted

    recipe = load_recipe(recipe_path, [two_each(world_size()), *overrides])
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        dist.all_gather_single = count("all-gather", dist.all_gather_single)
        dist.reduce_scatter_single = count("reduce-scatter", dist.reduce_scatter_single)
        trainer.train_step()
        trainer.close()
        del trainer
    return dict(sent)


@pytest.mark.parametrize(
    "world_size, overrides",
    [
        (2, [NO_CHANCE]),
        (3, [NO_CHANCE, "parallel.activation_checkpointing=block", "model.compute_dtype=bfloat16"]),
        (4, [NO_CHANCE, "parallel.dp_replicate=2", "objective.inner_sample=reuse", "objective.guidance=separate"]),
        (2, ["objective={name: sgmd, student_steps: 2, diversity: {weight: 0.1, steps: 2}}"]),
        (2, ["objective={name: dmd2, student_steps: 1, fake_updates: 2}"]),
        (2, ["objective={name: sid, student_steps: 1, guidance: separate}"]),
        (4, [NO_CHANCE, *ADAPTERS]),
    ],
)
def test_what_fsdp_sends_in_a_step_is_exact(recipe_path: Path, world_size: int, overrides: list[str]) -> None:
    sent = run_ranks(world_size, sent_bytes, recipe_path, overrides)[0]
    plan = make_plan(load_recipe(recipe_path, [two_each(world_size), *overrides]), Machine(1, world_size, 80))
    planned = {flow.kind: flow.sent_bytes for flow in plan.flows}
    assert sent == {kind: planned[kind] for kind in ("all-gather", "reduce-scatter")}


def passes_by_exit(recipe_path: Path, overrides: list[str], exits: list[int]) -> list[dict[str, float]]:
    """Passes of a step per sample by role, for each exit index."""
    recipe = load_recipe(recipe_path, overrides)
    found = []
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        for index in exits:
            Distillation.exit_index = lambda *args, index=index, **kwargs: index
            trainer.train_step()
            passes = trainer.roles.take_passes()
            found.append({role: count / recipe.data.global_batch_size for role, count in passes.items()})
        trainer.close()
        del trainer
    return found


@pytest.mark.parametrize(
    "overrides, total",
    [
        (["objective.inner_sample=fresh", "parallel.activation_checkpointing=block"], 17.0),
        (["objective.inner_sample=reuse", "parallel.activation_checkpointing=block"], 14.5),
        (["objective={name: dmd2, fake_updates: 2, guidance_scale: 1.0}"], None),
        (["objective={name: sid}", "parallel.activation_checkpointing=block"], 21.0),
        (["objective={name: sim, inner_sample: reuse, guidance: separate}"], None),
        ([*ADAPTERS, "parallel.activation_checkpointing=block"], None),
        (["objective={name: sgmd, student_steps: 3, guidance: separate, diversity: {weight: 0.1, steps: 2}}"], None),
    ],
)
def test_planned_passes_are_those_that_run(recipe_path: Path, overrides: list[str], total: float | None) -> None:
    """The mean over the exits and the most of them; for SGMD with recomputation the budget of the design."""
    overrides = ["data.global_batch_size=1", *overrides]
    objective = load_recipe(recipe_path, overrides).resolved()["objective"]
    exits = list(range(int("diversity" in str(overrides)), objective["student_steps"]))
    found = run_ranks(1, passes_by_exit, recipe_path, overrides, exits)[0]
    planned = make_plan(load_recipe(recipe_path, overrides), Machine(1, 1, 80)).passes
    for role, (mean, most) in planned.items():
        counts = [passes[role] for passes in found]
        assert (sum(counts) / len(counts), max(counts)) == (mean, most), role
    assert total is None or sum(mean for mean, _ in planned.values()) == total
