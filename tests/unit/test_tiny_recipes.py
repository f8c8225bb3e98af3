"""The shipped tiny recipes of the objectives beside SGMD train as they are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sgmd_dist.data.encode import TextEncoder
from sgmd_dist.data.world import World, write_world_shards
from sgmd_dist.parallel.mesh import build_mesh
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few videos of the recipes' world, which is thousands otherwise."""
    folder = tmp_path_factory.mktemp("data") / "world"
    write_world_shards(folder, World(), TextEncoder.from_pretrained(ROOT / "recipes/tiny_wan"), num_samples=32, seed=0)
    return folder


@pytest.mark.parametrize("name", ["tiny_sid", "tiny_sim"])
def test_a_tiny_recipe_trains_two_steps(
    name: str, shards: Path, alone: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients and passes through the teacher are there, and generator and fake score move."""
    monkeypatch.chdir(ROOT)  # shipped recipes name files relative to it
    settings = ["run.steps=2", "run.log_every=1", f"run.dir={tmp_path}", "logging.tensorboard=false"]
    small = [f"data.shards={shards}", "data.global_batch_size=2", "data.micro_batch_size=2"]
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [*settings, *small])
    trainer = Trainer(recipe, build_mesh(recipe.layout(1), alone))
    before = {role.name: [p.detach().clone() for p in role.parameters.values()] for role in trainer.roles.values()}
    try:
        assert trainer.fit() == 0
    finally:
        trainer.close()
    for role in trainer.roles.values():
        changed = any(
            not torch.equal(p, old) for p, old in zip(role.parameters.values(), before[role.name], strict=True)
        )
        assert changed == (role.name != "teacher")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert (
            line["generator/grad_norm"] > 0 and line["generator/fisher"] > 0 and line["generator/score_identity"] != 0
        )
        assert line["passes/teacher"] == 4, "two conditions, forward and backward"
