"""Where a run begins, from what lies in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sgmd_dist import checkpoint
from sgmd_dist.durable import lock
from sgmd_dist.errors import UserError
from sgmd_dist.recipe import Recipe
from sgmd_dist.resume import begin, decide
from sgmd_dist.roles import Roles
from sgmd_dist.wandb_run import ID_FILE

MakeRecipe = Callable[..., Recipe]


def commit(run_dir: Path, *steps: int) -> list[Path]:
    """Checkpoints as far as a beginning looks at them."""
    paths = [run_dir / checkpoint.FOLDER / f"step-{step:08d}" for step in steps]
    for path, step in zip(paths, steps, strict=True):
        path.mkdir(parents=True)
        meta = {"step": step, "stream": {}, "num_tensors": {}, "checksums": {}}
        (path / "meta.json").write_text(json.dumps(meta))
    return paths


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "a_run"


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe, run_dir: Path) -> Callable[[str], Recipe]:
    return lambda resume: tiny_recipe(f"run.dir={run_dir}", f"run.resume={resume}")


def test_auto_takes_the_newest_checkpoint_or_none(recipe: Callable[[str], Recipe], run_dir: Path) -> None:
    assert decide(recipe("auto")).candidates == ()
    older, newest = commit(run_dir, 2, 4)
    assert decide(recipe("auto")).candidates == (newest, older)


def test_a_checkpoint_that_lost_its_description_is_not_passed_over(
    recipe: Callable[[str], Recipe], run_dir: Path
) -> None:
    older, newest = commit(run_dir, 2, 4)
    (newest / "meta.json").unlink()
    assert decide(recipe("auto")).candidates == (newest, older)


def test_another_runs_checkpoint_counts_while_there_is_none_of_its_own(
    recipe: Callable[[str], Recipe], run_dir: Path, tmp_path: Path
) -> None:
    first, other = commit(tmp_path / "other", 6, 7)
    assert decide(recipe(str(other))).candidates == (other,), "one that is named has no stand-in"
    assert decide(recipe(str(tmp_path / "other"))).candidates == (other, first)
    (own,) = commit(run_dir, 8)
    assert decide(recipe(str(other))).candidates == (own, other)


def test_going_back_puts_later_steps_in_the_way(recipe: Callable[[str], Recipe], run_dir: Path) -> None:
    first, second, third = commit(run_dir, 2, 4, 6)
    beginning = decide(recipe(str(first)))
    assert (beginning.candidates, beginning.in_the_way) == ((first,), (second, third))
    assert checkpoint.committed(run_dir) == [first, second, third], "to look changes nothing"


def test_never_puts_everything_in_the_way(recipe: Callable[[str], Recipe], run_dir: Path) -> None:
    assert decide(recipe("never")).in_the_way == ()
    commit(run_dir, 2)
    (run_dir / "metrics.jsonl").write_text("")
    beginning = decide(recipe("never"))
    assert beginning.candidates == ()
    assert [path.name for path in beginning.in_the_way] == ["checkpoints", "metrics.jsonl"]


def test_a_run_that_does_steps_again_leaves_the_run_on_wandb_that_knows_them(
    recipe: Callable[[str], Recipe], run_dir: Path
) -> None:
    first, second = commit(run_dir, 2, 4)
    (run_dir / ID_FILE).write_text("1a2b3c4d\n")
    assert decide(recipe(str(first))).in_the_way == (second, run_dir / ID_FILE)
    assert run_dir / ID_FILE in decide(recipe("never")).in_the_way
    assert decide(recipe(str(second))).in_the_way == decide(recipe("auto")).in_the_way == ()


def test_a_path_without_a_checkpoint_is_refused(
    recipe: Callable[[str], Recipe], tmp_path: Path, alone: object, linear_roles: Callable[..., Roles]
) -> None:
    for look in (decide, lambda recipe: begin(recipe, linear_roles(), is_main=True)):
        with pytest.raises(UserError, match="nowhere: expected a checkpoint"):
            look(recipe(str(tmp_path / "nowhere")))


def test_what_is_set_aside_is_whole_and_numbered(
    recipe: Callable[[str], Recipe], run_dir: Path, alone: object, linear_roles: Callable[..., Roles]
) -> None:
    for number in (1, 2):
        commit(run_dir, 2)
        (run_dir / "metrics.jsonl").write_text(f"{number}")
        assert begin(recipe("never"), linear_roles(), is_main=True) is None
        assert checkpoint.committed(run_dir) == []
        assert (run_dir / f"earlier-{number}/metrics.jsonl").read_text() == f"{number}"
        assert len(checkpoint.committed(run_dir / f"earlier-{number}")) == 1


def test_a_locked_folder_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    refusal = f"{tmp_path}: in use; wait for it, or choose another folder"
    with (
        lock(tmp_path / ".lock", "in use"),
        pytest.raises(UserError, match=refusal),
        lock(tmp_path / ".lock", "in use"),
    ):
        pass
    with lock(tmp_path / ".lock", "in use"):
        pass
