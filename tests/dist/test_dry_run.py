"""`--dry-run`: the collectives of a real run, the same on every rank or refused, and the bytes of a rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from sgmd_dist.assemble import build_model
from sgmd_dist.dryrun import RankTrace, check_equal, chosen_ranks, first_difference, report, trace
from sgmd_dist.errors import UserError
from sgmd_dist.objectives._distillation import Distillation
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.tracing import Collective, Group, Tracer
from sgmd_dist.trainer import Trainer

NUM_BLOCKS = 1  # and the root: what is gathered early, and again, shows on these two
ROTARY_BYTES = 2 * 32 * 12 * 4  # two tables of 32 places x 12 numbers, whole on every rank
LAYOUTS = {
    "shards": (2, []),
    "replicas of shards": (4, ["data.global_batch_size=4", "parallel.dp_replicate=2"]),
    "shared sequences": (4, ["data.global_batch_size=1", "parallel.ulysses=2", "parallel.ring=2"]),
    "recomputed": (2, ["parallel.activation_checkpointing=block", "objective.inner_sample=reuse"]),
}


def dry(recipe_path: Path, overrides: list[str], num_ranks: int, ranks: list[int], patch=None) -> list[RankTrace]:
    """Traces of some ranks of `num_ranks`, each in a process of its own, which calls `patch` first."""
    return run_ranks(len(ranks), dry_rank, recipe_path, overrides, num_ranks, ranks, patch)


def dry_rank(recipe_path: Path, overrides: list[str], num_ranks: int, ranks: list[int], patch) -> RankTrace:
    if patch is not None:
        patch()
    return trace(load_recipe(recipe_path, overrides), num_ranks, ranks[int(os.environ["RANK"])])


def calls_of_step(traced: RankTrace, step: int) -> list[Collective]:
    return [call for part in traced.parts if part.name.startswith(f"step {step},") for call in part.collectives]


def real_calls(recipe_path: Path, overrides: list[str]) -> list[list[Collective]]:
    """What this rank issues in two steps of training."""
    recipe = load_recipe(recipe_path, overrides)
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        tracer = Tracer()
        for step in (1, 2):
            tracer.begin(f"step {step}")
            with tracer:
                trainer.train_step()
        trainer.close()
        del trainer
    return [part.collectives for part in tracer.parts[1:]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_run_issues_the_collectives_of_a_run(recipe_path: Path, layout: str) -> None:
    num_ranks, overrides = LAYOUTS[layout]
    found = run_ranks(num_ranks, real_calls, recipe_path, overrides)
    assert all(of_rank == found[0] for of_rank in found)
    for traced in dry(recipe_path, overrides, num_ranks, [0, num_ranks - 1]):
        for step in (1, 2):
            assert calls_of_step(traced, step) == found[traced.rank][step - 1] != []


def test_512_ranks_issue_the_same_collectives(recipe_path: Path) -> None:
    ranks = chosen_ranks(512)
    assert ranks == [0, 1, 255, 511]
    overrides = ["data.global_batch_size=128", "parallel.dp_replicate=8", "parallel.ulysses=2", "parallel.ring=2"]
    traces = dry(recipe_path, overrides, 512, ranks)
    check_equal(traces)
    groups = {call.group for part in traces[0].last_step for call in part.collectives}
    assert groups == {Group(64, 1), Group(8, 64), Group(4, 1), Group(2, 1), Group(2, 2)}
    assert "the same on these ranks" in "\n".join(report(traces, 512, planned=0))


def exit_by_rank() -> None:
    """Odd ranks run one more network pass than even ones, and wait for its weights forever."""
    Distillation.exit_index = lambda self, state, purpose, update=0: dist.get_rank() % 2


def test_an_exit_that_depends_on_the_rank_is_caught(recipe_path: Path) -> None:
    traces = dry(recipe_path, [], 2, [0, 1], exit_by_rank)
    with pytest.raises(UserError, match=r"ranks 0 and 1 part at collective \d+ of step 1, generator: rank 0 issues"):
        check_equal(traces)


def one_more_metric() -> None:
    """Rank 0 records a metric that the others do not: the reduction of the metrics is longer there."""
    generator_phase = Distillation._generator_phase

    def with_one_more(self, roles, batch, state):
        losses = generator_phase(self, roles, batch, state)
        if dist.get_rank() == 0:
            losses.metrics["more"] = torch.ones(())
        return losses

    Distillation._generator_phase = with_one_more


def test_a_shape_that_depends_on_the_rank_is_caught(recipe_path: Path) -> None:
    difference = first_difference(dry(recipe_path, [], 2, [0, 1], one_more_metric))
    assert difference is not None and "of the end of step 1" in difference
    assert "allreduce_ over 2 ranks of float32" in difference


def test_the_bytes_of_a_rank_are_those_of_its_shards(recipe_path: Path) -> None:
    """4 bytes a number in all three networks and the EMA, 8 for the moments of the two that are trained."""
    overrides = ["data.global_batch_size=4", "parallel.activation_checkpointing=block"]
    for num_ranks in (1, 4):
        (traced,) = dry(recipe_path, overrides, num_ranks, [0])
        numbers = local_numbers(recipe_path, num_ranks)
        for part in traced.last_step:
            assert part.peak["parameters"] == 3 * (4 * numbers + ROTARY_BYTES)
            assert part.peak["ema"] == 4 * numbers
            assert part.peak["optimizer"] == pytest.approx(2 * 8 * numbers, rel=0.02)  # and step counts
            assert part.peak["activations"] > 0
            assert (part.peak["gathered"] > 0) == (num_ranks > 1)


def test_memory_is_given_back_at_the_end_of_a_step(recipe_path: Path) -> None:
    (traced,) = dry(recipe_path, [], 2, [0])
    end = traced.parts[-1]
    assert end.name == "the end of step 2"
    assert end.peak["gathered"] == end.peak["gradients"] == 0
    assert 0 < end.peak["activations"] < 4096  # the metrics


def local_numbers(recipe_path: Path, num_ranks: int) -> int:
    """How many numbers of a network's parameters lie on rank 0: the first of the slices of each."""
    recipe = load_recipe(recipe_path)
    with torch.device("meta"):
        module = build_model(recipe, "generator").build()
    return sum(p.numel() // p.shape[0] * -(-p.shape[0] // num_ranks) for p in module.parameters())
