"""Saves that training does not wait for, saves that a rank does not survive, and writes that fail."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from checkpoint_cases import (
    load_and_check,
    save_until_killed,
    save_with_a_failing_write,
    train_on,
    train_on_a_full_disk,
    train_while_copying,
)
from ranks import DEADLINE_S, Ranks, run_ranks
from running import train

from sgmd_dist import checkpoint

# Of the third save, on a rank; together these are 10 for each mode.
NUM_BLOCKS = 1  # of the network: the run around it is what is tested
MOMENTS = [
    (0, "before the checks"),
    (1, "after the checks"),
    (1, "before a file is opened"),
    (1, "after a file is opened"),
    (0, "after a file is on the disk"),
    (0, "before DCP's list has its name"),
    (0, "before the description"),
    (0, "before the commit"),
    (0, "after the commit"),
    (0, "after an older one is taken back"),
]
COMMITTED = ("after the commit", "after an older one is taken back")


def kill_one(ranks: Ranks, victim: int) -> None:
    """Wait until the victim has killed itself, and end the others as a launcher does."""
    ranks.processes[victim].join(DEADLINE_S)
    if ranks.processes[victim].exitcode != -signal.SIGKILL:
        ranks.join()  # shows what went wrong instead
        raise AssertionError("nobody died")
    ranks.kill()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_kill_amid_a_save_leaves_the_newest_commit_whole(tmp_path: Path, asynchronous: bool) -> None:
    for number, (victim, moment) in enumerate(MOMENTS):
        run_dir = tmp_path / str(number)
        kill_one(Ranks(2, save_until_killed, run_dir, asynchronous, victim, moment), victim)
        expected = 3 if moment in COMMITTED else 2
        assert run_ranks(1, load_and_check, run_dir) == [expected], moment
        assert all(inspection.wrong is None for inspection in checkpoint.inspect(run_dir)), moment


def test_what_is_saved_is_the_step_that_was_asked_for_while_training_goes_on(tmp_path: Path) -> None:
    left = run_ranks(2, train_on, tmp_path)
    assert left[0] == ["step-00000002", "step-00000003"], "the newest two"


def test_a_run_saves_the_same_bits_at_once_and_while_it_trains_on(recipe_path: Path, tmp_path: Path) -> None:
    every = ["run.steps=2", "checkpoint.every=1", "checkpoint.keep=9"]
    found = {}
    for choice, function in (("false", train), ("true", train_while_copying)):
        run_dir = tmp_path / choice
        run_ranks(2, function, recipe_path, [*every, f"checkpoint.async={choice}", f"run.dir={run_dir}"])
        inspections = checkpoint.inspect(run_dir)
        assert [inspection.wrong for inspection in inspections] == [None] * 2
        found[choice] = [(i.meta.step, i.meta.stream, i.meta.checksums) for i in inspections if i.meta]
    assert found["true"] == found["false"]
    assert found["true"][0] != found["true"][1], "training changes what is saved"


@pytest.mark.parametrize("choice", ["true", "false"])
def test_a_run_on_a_full_disk_ends_with_2_on_all_ranks_and_keeps_what_it_has(recipe_path: Path, choice: str) -> None:
    overrides = ["run.steps=4", "checkpoint.every=1", f"checkpoint.async={choice}"]
    ranks = Ranks(2, train_on_a_full_disk, recipe_path, overrides)
    assert ranks.exit_codes() == [2, 2]
    run_dir = recipe_path.parent / "run"
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoint.inspect(run_dir)[0].wrong is None


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("rank, name", [(1, "__1_0.distcp"), (0, ".metadata")])
def test_a_full_disk_on_one_rank_is_one_message_on_all_and_commits_nothing(
    tmp_path: Path, asynchronous: bool, rank: int, name: str
) -> None:
    messages = run_ranks(2, save_with_a_failing_write, tmp_path, asynchronous, rank, name)
    assert messages[0] == messages[1]
    assert re.search(rf"step-00000002: not saved: rank {rank}: .*; mend the disk or folder", messages[0]), messages[0]
    assert "No space left" in messages[0]
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000001", "step-00000003"]
