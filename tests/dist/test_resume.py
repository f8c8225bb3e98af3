"""Kills, preemptions and changes of the number of ranks lose nothing: the final state is that of one quiet run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import RankError, Ranks, run_ranks
from running import State, max_difference, parameter_difference, train, train_command

from sgmd_dist import checkpoint
from sgmd_dist.checkpoint import folder
from sgmd_dist.trainer import Trainer

NUM_BLOCKS = 1  # of the network: the run around it is what is tested
LAST = 16
LONG = [f"run.steps={LAST}"]
TWELVE = ["run.steps=2", "data.global_batch_size=12"]  # whatever divides 12 may be the number of ranks


def run_dir(recipe_path: Path) -> Path:
    return recipe_path.parent / "run"


def wait_for(condition, ranks: Ranks, deadline_s: float = 120.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the run did not get there"
        assert all(process.is_alive() for process in ranks.processes), "a rank ended early"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[[Path], Path]) -> State:
    """The state that 2 undisturbed ranks reach in `LONG`."""
    return run_ranks(2, train, write_recipe(tmp_path_factory.mktemp("quiet")), LONG)[0]


def assert_same_bits(a: State, b: State) -> None:
    assert set(max_difference(a, b).values()) == {0.0}


def test_kill_at_random_moments_then_resume_gives_the_same_bits(recipe_path: Path, quiet: State) -> None:
    """SIGKILL strikes twice, at moments nobody chose, in a run with checkpoints every 2 steps."""
    overrides = [*LONG, "checkpoint.every=2"]
    moments = random.Random(time.time_ns())
    for _ in range(2):
        before = len(checkpoint.committed(run_dir(recipe_path)))
        newest = checkpoint.committed(run_dir(recipe_path))[-1:]
        ranks = Ranks(2, train, recipe_path, overrides)
        wait_for(lambda old=newest: checkpoint.committed(run_dir(recipe_path))[-1:] != old, ranks)
        time.sleep(delay := moments.uniform(0, 0.5))
        print(f"killing {delay:.3f} s after the commit that followed {before} checkpoints")
        ranks.kill()
    assert_same_bits(run_ranks(2, train, recipe_path, overrides)[0], quiet)
    lines = (run_dir(recipe_path) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, LAST + 1))


def test_a_signal_to_one_rank_saves_and_ends_all_with_75(recipe_path: Path, quiet: State) -> None:
    """SIGTERM; SIGUSR1 asks for the same, as unit/test_signals.py shows, and Slurm sends it in cli/test_slurm.py."""
    overrides = [*LONG, "checkpoint.every=100"]
    ranks = Ranks(2, train_command, recipe_path, overrides)
    wait_for((run_dir(recipe_path) / "metrics.jsonl").exists, ranks)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.exit_codes() == [75, 75]
    (saved,) = checkpoint.committed(run_dir(recipe_path))
    assert 0 < checkpoint.read_meta(saved).step < LAST
    assert_same_bits(run_ranks(2, train, recipe_path, overrides)[0], quiet)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[[Path], Path]) -> State:
    """The state that one undisturbed rank reaches in `TWELVE`."""
    return run_ranks(1, train, write_recipe(tmp_path_factory.mktemp("one")), TWELVE)[0]


@pytest.mark.parametrize("first, second", [(2, 1), (1, 3), (2, 4)])
def test_resuming_on_other_numbers_of_ranks_changes_only_rounding(
    recipe_path: Path, one_rank: State, first: int, second: int
) -> None:
    run_ranks(first, train, recipe_path, [*TWELVE, "run.steps=1"])
    state = run_ranks(second, train, recipe_path, TWELVE)[0]
    assert parameter_difference(state, one_rank) < 1e-6


def test_resuming_on_ranks_that_share_sequences_changes_only_rounding(recipe_path: Path, tmp_path: Path) -> None:
    small = ["data.global_batch_size=2", "objective.inner_sample=reuse"]
    run_ranks(2, train, recipe_path, [*small, "run.steps=2", "parallel.ulysses=2"])
    state = run_ranks(2, train, recipe_path, [*small, "run.steps=3", "parallel.ring=2"])[0]
    one = run_ranks(1, train, recipe_path, [*small, "run.steps=3", f"run.dir={tmp_path / 'one'}"])[0]
    assert parameter_difference(state, one) < 1e-6


def die_before_commit(recipe_path: Path, overrides: list[str]) -> None:
    """Train until the second checkpoint is written and die before the rename."""
    commit = folder.commit

    def commit_first_only(aside: Path, final: Path) -> None:
        if checkpoint.committed(run_dir(recipe_path)):
            os.kill(os.getpid(), signal.SIGKILL)
        commit(aside, final)

    folder.commit = commit_first_only
    train(recipe_path, overrides)


def test_a_kill_between_write_and_commit_leaves_the_checkpoint_before(recipe_path: Path, quiet: State) -> None:
    overrides = [*LONG, "checkpoint.every=3"]
    with pytest.raises(RankError, match="rank 0 ended without a result"):
        run_ranks(2, die_before_commit, recipe_path, overrides)
    checkpoints = run_dir(recipe_path) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000003", "step-00000006.tmp"]
    assert_same_bits(run_ranks(2, train, recipe_path, overrides)[0], quiet)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000015", "step-00000016"]


def test_the_only_checkpoint_where_it_is_damaged_is_named_and_not_trained_from(recipe_path: Path) -> None:
    run_ranks(2, train, recipe_path, ["run.steps=2"])
    (saved,) = checkpoint.committed(run_dir(recipe_path))
    shard = max(saved.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    shard.write_bytes(data)
    with pytest.raises(RankError, match=r"DamagedCheckpoint: .*step-00000002: is damaged: .*; use another checkpoint"):
        run_ranks(2, train, recipe_path, ["run.steps=4"])


def test_never_resuming_starts_anew_and_keeps_what_was_saved(recipe_path: Path) -> None:
    first = run_ranks(1, train, recipe_path, ["run.steps=2"])[0]
    again = run_ranks(1, train, recipe_path, ["run.steps=2", "run.resume=never"])[0]
    assert_same_bits(first, again)
    earlier = run_dir(recipe_path) / "earlier-1"
    assert sorted(path.name for path in earlier.iterdir()) == ["checkpoints", "metrics.jsonl"]
    assert [path.name for path in checkpoint.committed(earlier)] == ["step-00000002"]


def test_going_back_begins_a_branch_that_survives_preemption(recipe_path: Path) -> None:
    """Steps 2, 4, 6 are saved; a branch from step 2 is stopped at step 3 and called again by the same command."""
    run_ranks(1, train, recipe_path, ["run.steps=6", "checkpoint.every=2", "checkpoint.keep=9"])
    back = f"run.resume={run_dir(recipe_path)}/checkpoints/step-00000002"
    run_ranks(1, train, recipe_path, [back, "run.steps=3"])
    run_ranks(1, train, recipe_path, [back, "run.steps=4"])
    run_ranks(1, train, recipe_path, ["run.steps=5"])
    steps = [json.loads(line)["step"] for line in (run_dir(recipe_path) / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    kept = checkpoint.committed(run_dir(recipe_path) / "earlier-1")
    assert [path.name for path in kept] == ["step-00000004", "step-00000006"]


def test_a_second_run_in_the_same_folder_is_refused(recipe_path: Path) -> None:
    first = Ranks(1, train, recipe_path, ["run.steps=200"])
    wait_for((run_dir(recipe_path) / "metrics.jsonl").exists, first)
    try:
        with pytest.raises(RankError, match=r"UserError: .*run: run.dir is in use by another run"):
            run_ranks(1, train, recipe_path, ["run.steps=200"])
    finally:
        first.kill()


def spoil_and_train(recipe_path: Path, overrides: list[str]) -> None:
    """Train with a generator whose weights stop being numbers at the third step."""

    class Spoiled(Trainer):
        def train_step(self) -> None:
            super().train_step()
            if self.step == 3:
                next(self.roles["generator"].module.parameters()).data.fill_(float("nan"))

    train(recipe_path, overrides, Spoiled)


def test_weights_that_are_not_finite_replace_no_checkpoint(recipe_path: Path) -> None:
    with pytest.raises(RankError, match=r"UserError: .*weights of step 4 are not finite and are not saved"):
        run_ranks(2, spoil_and_train, recipe_path, ["run.steps=4", "checkpoint.every=2", "checkpoint.keep=1"])
    assert [path.name for path in checkpoint.committed(run_dir(recipe_path))] == ["step-00000002"]


def test_a_run_that_began_with_anothers_checkpoint_continues_with_its_own(recipe_path: Path, tmp_path: Path) -> None:
    run_ranks(1, train, recipe_path, ["run.steps=2"])
    branch = [f"run.dir={tmp_path}/branch", f"run.resume={run_dir(recipe_path)}"]
    run_ranks(1, train, recipe_path, [*branch, "run.steps=3"])
    run_ranks(1, train, recipe_path, [*branch, "run.steps=4"])
    lines = (tmp_path / "branch/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4], "step 3 is not done twice"


def test_another_seed_or_data_order_refuses_to_resume(recipe_path: Path) -> None:
    run_ranks(1, train, recipe_path, ["run.steps=2"])
    with pytest.raises(RankError, match=r"UserError: .*seed"):
        run_ranks(1, train, recipe_path, ["run.steps=4", "run.seed=4"])
