"""Checkpoints whose files changed on the disk: said clearly, set aside, and the one before used, by all ranks alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from checkpoint_cases import DAMAGE, FILES, fall_back, flip
from ranks import RankError, run_ranks
from running import State, max_difference, train

from sgmd_dist import checkpoint
from sgmd_dist.checkpoint import training_state
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.trainer import Trainer

NUM_BLOCKS = 1  # of the network: the run around it is what is tested
TWO = ["checkpoint.every=2", "checkpoint.keep=9"]


def run_dir(recipe_path: Path) -> Path:
    return recipe_path.parent / "run"


def tensors_of(checkpoint_: Path) -> Path:
    """The largest file with tensors."""
    return max(checkpoint_.glob("*.distcp"), key=lambda path: path.stat().st_size)


def test_whatever_is_damaged_the_one_before_is_loaded_whole(tmp_path: Path) -> None:
    """Every file of the newest, gone, cut and with one bit changed; and one that a single rank cannot read."""
    said, same = run_ranks(2, fall_back, tmp_path)
    assert said == same, "alike on all ranks"
    assert set(said) == {f"{name} {kind}" for name in FILES for kind in DAMAGE}
    for what, message in said.items():
        assert "step-00000003" in message and len(message) < 600, what
        assert "is damaged: " in message or "is not a checkpoint's description" in message, what


def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_bits(recipe_path: Path, tmp_path: Path) -> None:
    quiet = run_ranks(2, train, recipe_path, [*TWO, "run.steps=5", f"run.dir={tmp_path}/quiet"])[0]
    run_ranks(2, train, recipe_path, [*TWO, "run.steps=4"])
    newest = checkpoint.committed(run_dir(recipe_path))[-1]
    flip(tensors_of(newest))
    state: State = run_ranks(2, train, recipe_path, [*TWO, "run.steps=5"])[0]
    assert set(max_difference(state, quiet).values()) == {0.0}
    names = sorted(path.name for path in newest.parent.iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000004.damaged", "step-00000005"]
    steps = [json.loads(line)["step"] for line in (run_dir(recipe_path) / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_a_checkpoint_that_is_named_has_no_stand_in(recipe_path: Path) -> None:
    run_ranks(1, train, recipe_path, [*TWO, "run.steps=4"])
    before, named = checkpoint.committed(run_dir(recipe_path))
    flip(tensors_of(named))
    with pytest.raises(RankError, match=r"DamagedCheckpoint: .*step-00000004: is damaged"):
        run_ranks(1, train, recipe_path, [*TWO, "run.steps=5", f"run.resume={named}"])
    assert checkpoint.committed(run_dir(recipe_path)) == [before, named], "nothing was moved"
    flip(tensors_of(before))
    with pytest.raises(RankError, match=r"UserError: .*none of 2 checkpoints can be used; .* run\.resume=never: "):
        run_ranks(2, train, recipe_path, [*TWO, "run.steps=5"])
    assert checkpoint.committed(run_dir(recipe_path)) == [before, named], "nothing was moved"


def saved_keys(recipe_path: Path, overrides: list[str]) -> tuple[set[str], set[str], set[str]]:
    """What a step of training changed, what was saved after it, and what a new run asks for."""
    recipe = load_recipe(recipe_path, overrides)
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        trainer.fit()
        changed: set[str] = set()
        for role in trainer.roles.trained:
            assert role.optimizer is not None
            for name, parameter in role.parameters.items():
                changed.add(f"{role.name}.{name}")
                changed |= {f"{role.name}.optimizer.{name}.{key}" for key in role.optimizer.state[parameter]}
                changed |= {f"{role.name}.ema.{name}"} if role.ema is not None else set()
        trainer.close()
        saved = dcp.FileSystemReader(checkpoint.find(trainer.run_dir)).read_metadata().state_dict_metadata
        again = Trainer(recipe, trainer.mesh)
        asked = {f"{tree}.{key}" for tree, part in training_state(again.roles).items() for key in part}
        again.close()
        del trainer, again
    return changed, set(saved), asked


def test_no_key_is_lost_between_saving_and_loading(recipe_path: Path) -> None:
    changed, saved, asked = run_ranks(2, saved_keys, recipe_path, ["run.steps=1"])[0]
    assert len(changed) > 100
    assert changed == saved == asked
