"""The objective of docs/extending.md is a whole one: put in its place it is found, checked, planned and trained."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pages import page

import sgmd_dist.objectives
from sgmd_dist import recipe_reference, registry
from sgmd_dist.data.encode import TextEncoder
from sgmd_dist.data.world import World, write_world_shards
from sgmd_dist.parallel.mesh import build_mesh
from sgmd_dist.planner.machine import Machine
from sgmd_dist.planner.plan import make_plan
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
NAME = "guidance"


@pytest.fixture(autouse=True)
def _in_its_place(tmp_path: Path) -> Iterator[None]:
    """The page's file where the registry looks for objectives."""
    [example] = re.findall(r"```python\n(.*?)^```$", page("docs/extending.md").text, re.MULTILINE | re.DOTALL)
    folder = tmp_path / "objectives"
    folder.mkdir()
    (folder / f"{NAME}.py").write_text(example, encoding="utf-8")
    sgmd_dist.objectives.__path__.append(str(folder))
    yield
    sgmd_dist.objectives.__path__.remove(str(folder))
    sys.modules.pop(f"sgmd_dist.objectives.{NAME}", None)


def test_it_is_found_and_described() -> None:
    assert NAME in registry.available(registry.OBJECTIVES)
    assert f"### objective.name: {NAME}" in recipe_reference.reference()
    assert recipe_reference.undescribed() == []


def test_it_trains_two_steps_and_runs_the_passes_that_it_plans(
    alone: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the recipe names files relative to it
    shards = tmp_path / "shards"
    write_world_shards(shards, World(), TextEncoder.from_pretrained(ROOT / "recipes/tiny_wan"), num_samples=8, seed=0)
    small = ["data.global_batch_size=2", "data.micro_batch_size=2", "run.steps=2", "run.log_every=1"]
    places = [f"data.shards={shards}", f"run.dir={tmp_path}/run", "logging.tensorboard=false"]
    recipe = load_recipe("recipes/tiny_sgmd.yaml", [f"objective={{name: {NAME}}}", *small, *places])
    trainer = Trainer(recipe, build_mesh(recipe.layout(1), alone))
    before = {name: p.detach().clone() for name, p in trainer.roles["generator"].parameters.items()}
    try:
        assert trainer.fit() == 0
    finally:
        trainer.close()
    after = trainer.roles["generator"].parameters
    assert any(not torch.equal(p, before[name]) for name, p in after.items())
    lines = [json.loads(line) for line in (Path(recipe.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["generator/loss"] > 0 and math.isfinite(line["generator/grad_norm"]) for line in lines)
    assert lines[-1]["passes/teacher"] == 2, "both conditions"
    plan = make_plan(recipe, Machine(1, 1, 80.0, 989.0, 0.4, 300.0, 40.0), 0)
    assert plan.fits
