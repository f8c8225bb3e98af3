"""DMD2 with its GAN head: sharded training equals plain training, leaks nothing, resumes with the head."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from gan_reference import GanReference
from ranks import run_ranks
from running import State, max_difference, parameter_difference, train, train_unsaved
from test_passes import count_passes

from sgmd_dist import checkpoint
from sgmd_dist.parallel.mesh import world_size
from sgmd_dist.planner.machine import Machine
from sgmd_dist.planner.plan import make_plan
from sgmd_dist.recipe_file import load_recipe

TOLERANCE = 1e-6
OBJECTIVE = "objective={name: dmd2, fake_updates: 2, inner_sample: reuse}"
GAN = "objective.gan={weight: 0.3, fake_weight: 0.5, r1_weight: 0.2, width: 8, lr_ratio: 3.0}"
SHORT = [OBJECTIVE, GAN, "run.steps=3"]
VARIANTS = {
    "fresh": ["objective.inner_sample=fresh"],
    "the head alone": ["objective.gan.trains_blocks=false"],
}
LAYOUTS = {
    "2 ranks, block": (2, ["parallel.activation_checkpointing=block", "parallel.reshard_after_forward=false"]),
    "dp_replicate 2 x dp_shard 2": (4, ["data.global_batch_size=4", "parallel.dp_replicate=2"]),
    "ulysses 2": (2, ["parallel.ulysses=2", "parallel.activation_checkpointing=block"]),
    "ring 3, selective": (3, ["parallel.ring=3", "parallel.activation_checkpointing=selective"]),
}
_references: dict[tuple[str, ...], State] = {}


def reference(recipe_path: Path, overrides: list[str]) -> State:
    """The plain trainer's result, computed once per variant."""
    key = tuple(overrides)
    if key not in _references:
        torch.set_num_threads(1)
        _references[key] = GanReference(load_recipe(recipe_path, overrides)).train()
    return _references[key]


def parameters(state: State) -> State:
    return {name: part for name, part in state.items() if not name.endswith(".optimizer")}


def assert_equal_to_reference(recipe_path: Path, world_size: int, overrides: list[str], parallel: list[str]) -> None:
    state = run_ranks(world_size, train_unsaved, recipe_path, [*overrides, *parallel])[0]
    expected = reference(recipe_path, overrides)
    generator, average = (list(expected[name].values()) for name in ("generator", "generator.ema"))
    assert max(float((a - b).abs().max()) for a, b in zip(generator, average, strict=True)) > 1e-3
    assert parameter_difference(parameters(state), expected) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_equal_one_plain_process(recipe_path: Path, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    shared = [key for key in parallel if key.startswith("data.")]
    assert_equal_to_reference(recipe_path, world_size, [*SHORT, *shared], parallel)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_equals_one_plain_process(recipe_path: Path, variant: str) -> None:
    assert_equal_to_reference(recipe_path, 2, [*SHORT, *VARIANTS[variant]], [])


def test_each_of_two_experts_trains_its_own_head(recipe_path: Path, pair_folder: Path) -> None:
    assert_equal_to_reference(recipe_path, 2, [*SHORT, f"model.pretrained={pair_folder}"], [])


# Passes


def count_and_plan(recipe_path: Path, overrides: list[str]) -> tuple[Counter[str], float]:
    """The fake score's passes in a step, per sample, as hooks count them and as the plan has them."""
    (roles,) = count_passes(recipe_path, overrides, [1])
    plan = make_plan(load_recipe(recipe_path, overrides), Machine(1, world_size(), 80.0))
    return roles["fake_score"], plan.passes["fake_score"][0]


@pytest.mark.parametrize("r1_weight, judged", [(0.0, 2), (0.2, 3)])
def test_a_step_takes_the_planned_passes(recipe_path: Path, r1_weight: float, judged: int) -> None:
    """The generator's phase: forward, recomputation and input gradient. Two updates: generated and real samples."""
    overrides = [*SHORT, f"objective.gan.r1_weight={r1_weight}", "parallel.activation_checkpointing=block"]
    counts, planned = run_ranks(2, count_and_plan, recipe_path, overrides)[0]
    assert counts == {"forward": 2 + 2 * 2 * judged, "input": 1 + 2 * judged, "weight": 2 * judged}
    assert sum(counts.values()) == planned


# Resume


def test_a_resumed_run_has_the_same_bits_with_its_head(recipe_path: Path, tmp_path: Path) -> None:
    overrides = [*SHORT, "checkpoint.every=2"]
    quiet = run_ranks(2, train, recipe_path, [*overrides, f"run.dir={tmp_path / 'quiet'}"])[0]
    assert "head.logit.weight" in quiet["fake_score"] and "head.logit.weight.exp_avg" in quiet["fake_score.optimizer"]
    second = checkpoint.committed(tmp_path / "quiet")[0]
    resumed = run_ranks(2, train, recipe_path, [*overrides, f"run.resume={second}"])[0]
    assert set(max_difference(quiet, resumed).values()) == {0.0}
