"""Updates whose gradients are not finite: skipped alike on all ranks, and in a row the way back to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, run_ranks
from running import State, max_difference, parameter_difference, train

from sgmd_dist.shard import local
from sgmd_dist.trainer import Trainer

NUM_BLOCKS = 1  # of the network: the run around it is what is tested
BACK = ["run.steps=6", "checkpoint.every=2", "health.max_skipped=2"]


class Poisoned(Trainer):
    """The last rank's part of the generator's gradients is not a number at optimizer steps (from 0) that `hits`
    chooses."""

    def hits(self) -> bool:
        return self.step == 2

    def before_write(self) -> None:
        super().before_write()
        if self.hits() and self.mesh.rank == self.mesh.layout.world_size - 1:
            for parameter in self.roles["generator"].parameters.values():
                if parameter.grad is not None:
                    local(parameter.grad).fill_(float("nan"))


class PoisonedUntilNewNoise(Poisoned):
    def hits(self) -> bool:
        return self.step >= 3 and self.noise_seed == self.recipe.run.seed


class PoisonedFromStep3(Poisoned):
    def hits(self) -> bool:
        return self.step >= 3


def another(recipe_path: Path, write_recipe: Callable[[Path], Path]) -> Path:
    """The same recipe with a run folder of its own."""
    folder = recipe_path.parent / "another"
    folder.mkdir()
    return write_recipe(folder)


def lines(recipe_path: Path) -> list[dict[str, Any]]:
    return [*map(json.loads, (recipe_path.parent / "run/metrics.jsonl").read_text().splitlines())]


def rollbacks(recipe_path: Path) -> list[dict[str, int]]:
    return json.loads((recipe_path.parent / "run/rollbacks.json").read_text())


def assert_finite(state: State) -> None:
    assert all(tensor.isfinite().all() for part in state.values() for tensor in part.values())


def test_one_ranks_bad_gradients_skip_the_update_on_all(recipe_path: Path, write_recipe: Callable[[Path], Path]) -> None:
    alone = another(recipe_path, write_recipe)
    states = [run_ranks(n, train, path, [], Poisoned)[0] for n, path in ((1, alone), (2, recipe_path))]
    assert_finite(states[1])
    assert parameter_difference(*states) < 1e-6
    found = lines(recipe_path)
    assert [line["generator/skipped"] for line in found] == [0, 0, 1, 0, 0]
    assert ["generator/grad_norm" in line for line in found] == [True, True, False, True, True]
    assert all(line["fake_score/skipped"] == 0 for line in found)


def test_skipped_in_a_row_the_run_goes_back_and_on_with_new_noise(recipe_path: Path) -> None:
    state = run_ranks(2, train, recipe_path, BACK, PoisonedUntilNewNoise)[0]
    assert_finite(state)
    assert rollbacks(recipe_path) == [{"from": 5, "to": 4}]
    assert [line["step"] for line in lines(recipe_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["generator/skipped"] for line in lines(recipe_path)] == [0, 0, 0, 1, 0, 0]


def test_a_run_that_went_back_resumes_with_the_noise_that_it_had(recipe_path: Path, write_recipe: Callable[[Path], Path]) -> None:
    quiet = run_ranks(1, train, recipe_path, BACK, PoisonedUntilNewNoise)[0]
    stopped = another(recipe_path, write_recipe)
    run_ranks(1, train, stopped, [*BACK, "run.steps=5"], PoisonedUntilNewNoise)
    resumed = run_ranks(1, train, stopped, BACK, PoisonedUntilNewNoise)[0]
    assert set(max_difference(quiet, resumed).values()) == {0.0}


def test_a_run_that_fails_again_and_again_gives_up_and_says_what_to_do(recipe_path: Path) -> None:
    with pytest.raises(RankError, match=r"UserError: health.max_skipped = 2: so many .* after 1 rollbacks .* lower"):
        run_ranks(2, train, recipe_path, [*BACK, "health.rollbacks=1"], PoisonedFromStep3)
    assert rollbacks(recipe_path) == [{"from": 5, "to": 4}]


def test_without_a_checkpoint_there_is_no_way_back(recipe_path: Path) -> None:
    with pytest.raises(RankError, match=r"UserError: health.max_skipped = 2: .*/run has no checkpoint to go back to"):
        run_ranks(1, train, recipe_path, [*BACK, "checkpoint.every=9"], PoisonedFromStep3)


def test_a_run_that_starts_anew_has_never_gone_back(recipe_path: Path) -> None:
    run_ranks(1, train, recipe_path, BACK, PoisonedUntilNewNoise)
    run_ranks(1, train, recipe_path, ["run.steps=1", "run.resume=never"])
    run_dir = recipe_path.parent / "run"
    assert not (run_dir / "rollbacks.json").exists() and (run_dir / "earlier-1/rollbacks.json").exists()
