"""DMD2 with its GAN head: sharded training equals plain training, leaks nothing, resumes with the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gan_reference import GanReference
from ranks import run_ranks
from running import State, max_difference, parameter_difference, train

from sgmd_dist.recipe_file import load_recipe

TOLERANCE = 1e-6
OBJECTIVE = "objective={name: dmd2, fake_updates: 2, inner_sample: reuse}"
GAN = "objective.gan={weight: 0.3, fake_weight: 0.5, r1_weight: 0.2, width: 8, lr_ratio: 3.0}"
SHORT = [OBJECTIVE, GAN, "data.global_batch_size=4", "run.steps=3"]
VARIANTS = {
    "whole": [],
    "fresh": ["objective.inner_sample=fresh"],
    "without R1": ["objective.gan.r1_weight=0"],
    "the head alone": ["objective.gan.trains_blocks=false"],
}
LAYOUTS = {
    "1 rank": (1, []),
    "2 ranks": (2, []),
    "3 ranks": (3, ["data.global_batch_size=6"]),
    "block": (2, ["parallel.activation_checkpointing=block", "parallel.reshard_after_forward=false"]),
    "selective": (2, ["parallel.activation_checkpointing=selective"]),
    "dp_replicate 2 x dp_shard 2": (4, ["parallel.dp_replicate=2"]),
    "ulysses 2": (2, ["parallel.ulysses=2", "parallel.activation_checkpointing=block"]),
    "ring 3": (3, ["parallel.ring=3"]),
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
    state = run_ranks(world_size, train, recipe_path, [*overrides, *parallel])[0]
    expected = reference(recipe_path, overrides)
    moved = (expected["generator"]["proj_out.weight"] - expected["generator.ema"]["proj_out.weight"]).abs().max()
    assert moved > 1e-3
    assert parameter_difference(parameters(state), expected) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_equal_one_plain_process(recipe_path: Path, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    shared = [key for key in parallel if key.startswith("data.")]
    assert_equal_to_reference(recipe_path, world_size, [*SHORT, *shared], parallel)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "whole"])
def test_a_variant_equals_one_plain_process(recipe_path: Path, variant: str) -> None:
    assert_equal_to_reference(recipe_path, 2, [*SHORT, *VARIANTS[variant]], [])
