"""Weights & Biases: asked for and missing is a mistake with a mend; there, it gets every scalar under one run's id."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sgmd_dist import wandb_run
from sgmd_dist.errors import UserError
from sgmd_dist.metrics import RunLog
from sgmd_dist.recipe import Recipe
from sgmd_dist.wandb_run import ID_FILE, WandbRun

ON = "logging.wandb={project: films, tags: [a, b], mode: offline}"


class FakeWandb(ModuleType):
    """What of the package is called, with a note of the arguments."""

    Error, Settings = RuntimeError, dict

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin=__file__)
        self.starts: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_codes: list[int] = []

    def init(self, **arguments: Any) -> FakeWandb:
        self.starts.append(arguments)
        return self

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.logged.append((step, scalars))

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def write(recipe: Recipe, steps: list[int]) -> None:
    """A log of these steps in the recipe's run folder."""
    run_dir = Path(recipe.run.dir)
    run_dir.mkdir(exist_ok=True)
    options = {"is_main": True, "tensorboard": False, "first_step": steps[0] - 1, "num_steps": 10}
    with RunLog(run_dir, wandb=WandbRun(recipe), **options) as log:
        for step in steps:
            log.write(step, {"generator/grad_norm": step / 10})


def test_the_missing_package_is_named_before_a_gpu_is_taken(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "wandb").exists()])
    sys.path_importer_cache.clear()
    (tmp_path / "wandb").mkdir()  # as offline runs leave one
    for folders in ([], [str(tmp_path)]):
        monkeypatch.setattr(sys, "path", [*folders, *sys.path])
        with pytest.raises(UserError, match=r"logging.wandb: .* not installed; pip install 'sgmd_dist\[wandb\]'"):
            wandb_run.check(tiny_recipe(ON))
    wandb_run.check(tiny_recipe())


def test_a_run_reports_its_recipe_and_every_scalar(tiny_recipe: Callable[..., Recipe], fake: FakeWandb) -> None:
    recipe = tiny_recipe(ON)
    wandb_run.check(recipe)
    write(recipe, [1, 2])
    (start,) = fake.starts
    asked = {"project": "films", "entity": None, "group": None, "tags": ["a", "b"], "mode": "offline"}
    assert asked.items() <= start.items()
    assert start["name"] == "tiny" and start["config"] == recipe.resolved() and start["dir"] == recipe.run.dir
    assert fake.logged == [(1, {"generator/grad_norm": 0.1}), (2, {"generator/grad_norm": 0.2})]
    assert fake.exit_codes == [0]


def test_a_run_that_fails_ends_as_failed(tiny_recipe: Callable[..., Recipe], fake: FakeWandb) -> None:
    def fail(scalars: dict[str, float], step: int) -> None:
        raise KeyboardInterrupt

    fake.log = fail
    with pytest.raises(KeyboardInterrupt):
        write(tiny_recipe(ON), [1])
    assert fake.exit_codes == [1]


def test_a_resumed_run_is_the_same_run(tiny_recipe: Callable[..., Recipe], fake: FakeWandb) -> None:
    write(tiny_recipe(ON), [1])
    write(tiny_recipe(ON), [2])
    first, second = fake.starts
    assert first["id"] == second["id"] == (Path(tiny_recipe().run.dir) / ID_FILE).read_text().strip()
    assert first["resume"] == second["resume"] == "allow"


def test_what_the_package_refuses_is_said_with_a_mend(tiny_recipe: Callable[..., Recipe], fake: FakeWandb) -> None:
    def refuse(**arguments: Any) -> FakeWandb:
        raise fake.Error("api_key not configured (no-tty). Call wandb.login")

    fake.init = refuse
    with pytest.raises(UserError, match=r"logging.wandb: .*api_key not configured .*; run `wandb login`"):
        write(tiny_recipe(ON), [1])


@pytest.mark.parametrize("what", ["log", "finish"])
def test_training_goes_on_where_the_package_fails_later(
    tiny_recipe: Callable[..., Recipe], fake: FakeWandb, what: str
) -> None:
    calls: list[int] = []

    def fail(*arguments: Any, **named: Any) -> None:
        calls.append(1)
        raise ConnectionResetError("the service is gone")

    setattr(fake, what, fail)
    write(tiny_recipe(ON), [1, 2])
    assert len(calls) == 1, "it is asked no more"
    assert len((Path(tiny_recipe().run.dir) / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_package_itself_keeps_an_offline_run(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(ON)
    write(recipe, [1, 2])
    write(recipe, [3])
    kept = (Path(recipe.run.dir) / ID_FILE).read_text().strip()
    folders = sorted((Path(recipe.run.dir) / "wandb").glob(f"offline-run-*-{kept}"))
    assert len(folders) == 2 and all(list(folder.glob("*.wandb")) for folder in folders)
