"""Sharded training equals plain single-process training with the same global batch, and a gradient leak shows."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from reference import Reference
from running import State, Unsaved, max_difference, parameter_difference, train, train_unsaved
from torch import nn
from torch._dynamo.utils import counters

from sgmd_dist.batch import Batch
from sgmd_dist.objectives.base import Phase, StepState
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.trainer import Trainer

TOLERANCE = 1e-6
STEPS = 3  # what ranks do otherwise shows in the first, or where the second begins with what it left
FOUR = "data.global_batch_size=4"
SIX = "data.global_batch_size=6"
VARIANTS = {
    "fresh": [SIX],
    "reuse": [FOUR, "objective.inner_sample=reuse", "objective.fake_updates=2"],
    "diversity": ["objective.diversity.weight=0.05", "objective.guidance=separate"],
    "exit_groups": ["data.global_batch_size=12", "objective.exit_groups=2"],  # groups of 6
}
DMD2 = [SIX, "objective={name: dmd2, fake_updates: 2}"]
_references: dict[tuple[str, ...], State] = {}


def reference(recipe_path: Path, overrides: list[str]) -> State:
    """The plain trainer's result, computed once per variant."""
    key = tuple(overrides)
    if key not in _references:
        torch.set_num_threads(1)
        _references[key] = Reference(load_recipe(recipe_path, overrides)).train()
    return _references[key]


def moved(state: State) -> float:
    """How far the EMA is from the generator: shows that training did something."""
    pairs = zip(state["generator"].values(), state["generator.ema"].values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def only_reference_trees(state: State) -> State:
    return {name: part for name, part in state.items() if not name.endswith(".optimizer")}


@pytest.mark.parametrize(
    "variant, world_size",
    [("fresh", 1), ("fresh", 2), ("fresh", 3), ("reuse", 2), ("diversity", 2), ("exit_groups", 3)],
)
def test_ranks_equal_one_plain_process(recipe_path: Path, variant: str, world_size: int) -> None:
    """SGMD steps of 6 micro-batches: accumulation 6, 3 and 2; twice as many in groups."""
    state = run_ranks(world_size, train_unsaved, recipe_path, VARIANTS[variant])[0]
    expected = reference(recipe_path, VARIANTS[variant])
    assert moved(expected) > 1e-3
    assert parameter_difference(only_reference_trees(state), expected) < TOLERANCE


@pytest.mark.parametrize("world_size", [2, 3])
def test_dmd2_ranks_equal_one_plain_process(recipe_path: Path, world_size: int) -> None:
    state = run_ranks(world_size, train_unsaved, recipe_path, DMD2)[0]
    expected = reference(recipe_path, DMD2)
    assert moved(expected) > 1e-3
    assert parameter_difference(only_reference_trees(state), expected) < TOLERANCE


LAYOUTS = {
    "dp_shard 4": (4, [FOUR]),
    "dp_replicate 2 x dp_shard 2": (4, [FOUR, "parallel.dp_replicate=2"]),
    "gathered again from 2 of 4": (4, [FOUR, "parallel.reshard_after_forward=2"]),
    "block, gathered until the backward pass": (2, ["parallel.activation_checkpointing=block", "parallel.reshard_after_forward=false"]),
    "selective, no prefetch": (
        2,
        ["parallel.activation_checkpointing=selective", "parallel.forward_prefetch=0", "parallel.backward_prefetch=0"],
    ),
    "teacher on the host, deep prefetch": (
        2,
        ["parallel.teacher_offload=true", "parallel.forward_prefetch=9", "parallel.backward_prefetch=9"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_plain_process(recipe_path: Path, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    shared = [key for key in parallel if key.startswith(("run.", "data."))]
    state = run_ranks(world_size, train_unsaved, recipe_path, parallel)[0]
    expected = reference(recipe_path, shared)
    assert moved(expected) > 1e-3
    assert parameter_difference(only_reference_trees(state), expected) < TOLERANCE


def train_compiled(recipe_path: Path, overrides: list[str]) -> tuple[State, int, int]:
    """Inductor makes kernels of one block of the generator; the graphs of all others run, forward and backward, as they
    are, as it takes Inductor 5 s for each. Also the number of graphs, and of those that Inductor had."""
    compiled, number = nn.Module.compile, itertools.count()
    nn.Module.compile = lambda self: compiled(self, backend="inductor" if next(number) == 3 else "aot_eager")
    state = train_unsaved(recipe_path, overrides)
    of_inductor = counters["inductor"]
    return state, counters["stats"]["unique_graphs"], of_inductor["fxgraph_cache_hit"] + of_inductor["fxgraph_cache_miss"]


def test_compiled_blocks_equal_one_plain_process(recipe_path: Path) -> None:
    """On one rank, as all ranks compile the same; test_sequence.py compiles on two."""
    compiled = ["parallel.activation_checkpointing=selective", "parallel.compile=true"]
    state, num_graphs, of_inductor = run_ranks(1, train_compiled, recipe_path, ["run.steps=2", *compiled])[0]
    assert num_graphs > of_inductor > 0
    assert parameter_difference(only_reference_trees(state), reference(recipe_path, ["run.steps=2"])) < TOLERANCE


SEQUENCE_LAYOUTS = {
    "dp 2 x ulysses 2": (4, ["parallel.ulysses=2", "parallel.activation_checkpointing=block"]),
    "ring 3": (3, ["parallel.ring=3"]),
    "ulysses 2 x ring 2": (4, ["parallel.ulysses=2", "parallel.ring=2"]),
}


@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
def test_ranks_that_share_sequences_equal_one_plain_process(recipe_path: Path, layout: str) -> None:
    world_size, parallel = SEQUENCE_LAYOUTS[layout]
    state = run_ranks(world_size, train_unsaved, recipe_path, parallel)[0]
    expected = reference(recipe_path, [])
    assert moved(expected) > 1e-3
    assert parameter_difference(only_reference_trees(state), expected) < TOLERANCE


def test_ranks_that_share_sequences_log_what_one_process_logs(recipe_path: Path) -> None:
    """Losses, gradient norms, passes per sample and the place in the data, step by step."""
    overrides = ["run.steps=2", "objective.inner_sample=reuse"]
    logs = []
    for world_size, parallel in ((1, []), (2, ["parallel.ring=2"])):
        run_dir = recipe_path.parent / f"{world_size}"
        run_ranks(world_size, train_unsaved, recipe_path, [*overrides, *parallel, f"run.dir={run_dir}"])
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if not k.startswith(("time", "perf/")) and not k.endswith("_s")} for line in lines])
    one, two = logs
    assert len(one) == 2 and one[0].keys() >= {"generator/grad_norm", "fake_score/loss", "passes/teacher", "data/unit"}
    assert two == [pytest.approx(line, rel=1e-4) for line in one]


class SkippingTrainer(Unsaved):
    """Meets an unreadable sample, the first of each micro-batch, on its last rank alone."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        super().__init__(recipe, mesh)
        read = self.stream.next

        def next_batch() -> Batch:
            batch = read()
            if self.mesh.rank < self.mesh.layout.world_size - 1:
                return batch
            return replace(batch, valid=batch.valid & (torch.arange(batch.size) > 0))

        self.stream.next = next_batch


def train_skipping(recipe_path: Path, overrides: list[str]) -> State:
    return train(recipe_path, overrides, SkippingTrainer)


def test_a_sample_that_one_rank_of_a_sequence_cannot_read_weighs_nothing_on_all(recipe_path: Path) -> None:
    overrides = ["data.global_batch_size=4", "data.micro_batch_size=2", "run.steps=2", "data.max_skips=99"]
    one = run_ranks(1, train_skipping, recipe_path, [*overrides, f"run.dir={recipe_path.parent}/one"])[0]
    two = run_ranks(2, train_skipping, recipe_path, [*overrides, "parallel.ring=2"])[0]
    whole = run_ranks(1, train_unsaved, recipe_path, [*overrides, f"run.dir={recipe_path.parent}/whole"])[0]
    assert parameter_difference(two, one) < TOLERANCE < parameter_difference(whole, one)


def test_bfloat16_ranks_agree_within_rounding(recipe_path: Path) -> None:
    """bf16 compute has 8 bits of mantissa: 2 ranks stay within 5% of the distance that training goes."""
    overrides = ["model.compute_dtype=bfloat16"]
    one, two = (run_ranks(n, train_unsaved, recipe_path, overrides)[0] for n in (1, 2))
    exact = reference(recipe_path, [])
    assert parameter_difference(two, one) < 0.05 * moved(exact)
    assert parameter_difference(only_reference_trees(two), exact) < 0.5 * moved(exact)
    assert all(p.dtype == torch.float32 for p in two["generator"].values())


class LeakyTrainer(Unsaved):
    """Does not freeze: backpropagates through a trainable fake score without sync and clears its gradients after."""

    def _train_phase(self, phase: Phase, state: StepState) -> None:
        fake = self.roles["fake_score"]
        if phase.role == "fake_score":
            super()._train_phase(phase, state)
            return
        self.roles.train_only = lambda name: None
        for role in self.roles.trained:
            role.module.requires_grad_(True)
        fake.module.set_requires_gradient_sync(False)
        super()._train_phase(phase, state)
        fake.optimizer.zero_grad()
        fake.module.set_requires_gradient_sync(True)
        del self.roles.train_only


def train_leaky(recipe_path: Path) -> State:
    return train(recipe_path, [], LeakyTrainer)


def test_unsynced_gradients_of_an_unfrozen_fake_score_leak(recipe_path: Path) -> None:
    """The equality above would not hold with the no-sync + zero_grad pattern instead of freezing."""
    state = run_ranks(2, train_leaky, recipe_path)[0]
    differences = max_difference(only_reference_trees(state), reference(recipe_path, []))
    assert differences["fake_score"] > 1000 * TOLERANCE
