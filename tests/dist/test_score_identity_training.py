"""SiD and SIM differentiate the frozen teacher for its input: sharded training equals plain single-process training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_reference import LoraReference
from ranks import run_ranks
from reference import Reference
from running import State, parameter_difference, train_unsaved
from test_passes import count_passes

from sgmd_dist.recipe_file import load_recipe

TOLERANCE = 1e-6
OBJECTIVES = {
    "sid": "objective={name: sid, alpha: 1.2}",
    "sim": "objective={name: sim, huber_c: 0.2, inner_sample: reuse, guidance: separate}",
}
LAYOUTS = {
    "2 ranks": [],
    "teacher on the host": ["parallel.teacher_offload=true"],
    "teacher on the host, checkpointing": ["parallel.teacher_offload=true", "parallel.activation_checkpointing=block"],
    "selective": ["parallel.activation_checkpointing=selective", "parallel.reshard_after_forward=false"],
    "ulysses 2": ["parallel.ulysses=2", "parallel.activation_checkpointing=block"],
}
ADAPTERS = ["model.generator.lora={rank: 4, alpha: 8}", "model.fake_score.lora={rank: 3}"]
_references: dict[tuple[str, ...], State] = {}


def reference(recipe_path: Path, overrides: list[str], kind: type[Reference] = Reference) -> State:
    """The plain trainer's result, computed once per variant."""
    key = tuple(overrides)
    if key not in _references:
        torch.set_num_threads(1)
        _references[key] = kind(load_recipe(recipe_path, overrides)).train()
    return _references[key]


def parameters(state: State) -> State:
    return {name: part for name, part in state.items() if not name.endswith(".optimizer")}


def moved(state: State) -> float:
    """How far the EMA is from the generator: shows that training did something."""
    pairs = zip(state["generator"].values(), state["generator.ema"].values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def three_steps(name: str, *overrides: str) -> list[str]:
    return [OBJECTIVES[name], "run.steps=3", *overrides]


@pytest.mark.parametrize(
    "name, layout", [*(("sid", layout) for layout in LAYOUTS), ("sim", "2 ranks")]
)
def test_two_ranks_equal_one_plain_process(recipe_path: Path, name: str, layout: str) -> None:
    state = run_ranks(2, train_unsaved, recipe_path, three_steps(name, *LAYOUTS[layout]))[0]
    expected = reference(recipe_path, three_steps(name))
    assert moved(expected) > 1e-3
    assert parameter_difference(parameters(state), expected) < TOLERANCE


def test_the_base_of_both_adapters_is_differentiated_as_the_teacher_too(recipe_path: Path) -> None:
    """One module, three graphs: the generator's with its adapter, the fake score's with its own, the teacher's bare."""
    overrides = three_steps("sid", *ADAPTERS)
    state = run_ranks(2, train_unsaved, recipe_path, [*overrides, "parallel.activation_checkpointing=block"])[0]
    expected = reference(recipe_path, overrides, LoraReference)
    assert moved(expected) > 1e-3
    assert parameter_difference(parameters(state), expected) < TOLERANCE


def test_a_bfloat16_teacher_on_the_host_gives_two_ranks_the_gradient_of_one(recipe_path: Path) -> None:
    """8 bits of mantissa: 2 ranks stay within 5% of the distance that training goes, and near the exact result."""
    overrides = three_steps("sid", "model.compute_dtype=bfloat16")
    one = run_ranks(1, train_unsaved, recipe_path, overrides)[0]
    two = run_ranks(2, train_unsaved, recipe_path, [*overrides, "parallel.teacher_offload=true"])[0]
    exact = reference(recipe_path, three_steps("sid"))
    assert parameter_difference(two, one) < 0.05 * moved(exact)
    assert parameter_difference(parameters(two), exact) < 0.5 * moved(exact)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_weight_gradient_of_teacher_or_fake_score_is_computed(recipe_path: Path, name: str) -> None:
    """The generator phase differentiates both for the input alone: forward, recomputation, input gradient."""
    overrides = [OBJECTIVES[name], "parallel.activation_checkpointing=block"]
    (roles,) = run_ranks(2, count_passes, recipe_path, overrides, [1])[0]
    assert roles["teacher"] == {"forward": 4, "input": 2}
    assert roles["fake_score"] == {"forward": 4, "input": 2, "weight": 1}
