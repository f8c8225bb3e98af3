"""What a step gathers and reduces: as many collectives as its passes need, and no more."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from sgmd_dist.objectives._distillation import Distillation
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.trainer import Trainer

UNITS = 2 + 1  # FSDP2 groups of a network: its blocks and its root


def count_collectives(recipe_path: Path, overrides: list[str], exit_index: int) -> Counter[str]:
    """Collectives of the second optimizer step on this rank, with the exit index fixed."""
    Distillation.exit_index = lambda *args, **kwargs: exit_index
    recipe = load_recipe(recipe_path, ["data.global_batch_size=2", *overrides])
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        trainer.train_step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            trainer.train_step()
        trainer.close()
        del trainer
    return Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))


@pytest.mark.parametrize(
    "overrides, gathers_per_graph",
    [
        ([], 2),
        (["parallel.forward_prefetch=2", "parallel.backward_prefetch=2"], 2),
        (["parallel.forward_prefetch=0", "parallel.backward_prefetch=0"], 2),
        (["parallel.activation_checkpointing=block"], 2),
        (["parallel.reshard_after_forward=false"], None),
    ],
)
def test_a_step_gathers_each_network_once_per_forward_and_once_per_backward(
    recipe_path: Path, overrides: list[str], gathers_per_graph: int | None
) -> None:
    """Exit 1: the generator phase runs 1 forward without a graph, the graph's generator and fake score, the teacher;
    the fake score's phase 2 forwards without a graph and its own with one."""
    counts = run_ranks(2, count_collectives, recipe_path, overrides, 1)[0]
    without_graph, with_graph = (1 + 1) + 2, 2 + 1
    if gathers_per_graph is None:  # blocks stay gathered between the passes of a phase: 3 networks, and 2
        expected = (3 + 2) * 2 + (without_graph + 2 * with_graph)
    else:
        expected = UNITS * (without_graph + gathers_per_graph * with_graph)
    assert counts["c10d::_allgather_base_"] == expected
    assert counts["c10d::_reduce_scatter_base_"] == 2 * UNITS  # the generator's and the fake score's weights, once


def count_groups(recipe_path: Path, overrides: list[str]) -> int:
    recipe = load_recipe(recipe_path, ["data.global_batch_size=4", *overrides])
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        count = len(torch.distributed.distributed_c10d._world.pg_map)
        trainer.close()
        del trainer
    return count


def test_blocks_that_are_gathered_again_from_a_few_ranks_share_process_groups(recipe_path: Path) -> None:
    """Two of its own for each of three networks, however many blocks they have."""
    whole, few = (
        run_ranks(4, count_groups, recipe_path, [f"parallel.reshard_after_forward={value}"])[0] for value in ("true", "2")
    )
    assert few <= whole + 2 * 3
