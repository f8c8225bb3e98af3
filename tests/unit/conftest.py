"""A tiny recipe, a process group of one process, and roles without a video model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from sgmd_dist.data.world import World, WorldSample
from sgmd_dist.parallel.mesh import process_group
from sgmd_dist.recipe import OptimSection, Recipe
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.roles import Roles, build_roles

SHIPPED = Path(__file__).parents[2] / "recipes" / "tiny_wan"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def wan_copy(tmp_path: Path) -> Path:
    """A copy of the shipped tiny Wan that the test may damage."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "wan"))


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """Makes SGMD on the world with a random tiny Wan, in a run folder of the test; takes overrides."""
    config = {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 3,
        "text_dim": 32, "freq_dim": 16, "ffn_dim": 32,
    }  # fmt: skip
    sections: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(tmp_path / "run"), "steps": 10},
        "model": {"family": "wan", "config": config, "compute_dtype": "float32", "text_tokens": 8},
        "objective": {"name": "sgmd"},
        "data": {
            "shards": "world:moving_shapes", "global_batch_size": 8, "micro_batch_size": 2, "text_encoder": str(SHIPPED)
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return lambda *overrides: load_recipe(path, overrides)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment as in `python launch/train.py`."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def alone() -> Iterator[torch.device]:
    """The process group of one process, for all tests of a file; its device."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER_VARIABLES:
            patch.delenv(name, raising=False)
        with process_group() as device:
            yield device


def make_linear_roles(seed: int = 0, size: int = 6) -> Roles:
    """A trained generator, a trained fake score and a frozen teacher, linear layers all of them."""
    torch.manual_seed(seed)
    names = ("teacher", "generator", "fake_score")
    modules: dict[str, Any] = {name: (nn.Linear(size, 3), None) for name in names}
    return build_roles(modules, {"generator", "fake_score"}, OptimSection(), 10, recomputes=False)


def take_step(roles: Roles, name: str = "generator", step: int = 0) -> None:
    """An optimizer step of role `name` with gradients that follow from its weights."""
    for parameter in roles[name].module.parameters():
        parameter.grad = parameter.detach() + 1
    roles.step(name, step)


@pytest.fixture
def linear_roles() -> Callable[..., Roles]:
    """`make_linear_roles`: networks that need no video."""
    return make_linear_roles


@pytest.fixture
def optimizer_step() -> Callable[..., None]:
    return take_step


@pytest.fixture(scope="session")
def world_samples() -> tuple[list[WorldSample], torch.Tensor]:
    """400 samples of the default world, and their latents stacked."""
    samples = [World().sample(0, index) for index in range(400)]
    return samples, torch.stack([sample.latents for sample in samples])
