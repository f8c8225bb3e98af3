"""Shared by the tests on gloo ranks: a random tiny Wan folder and the world's shards, made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel

from sgmd_dist.data.encode import TextEncoder
from sgmd_dist.data.world import World, write_world_shards

REPO = Path(__file__).parents[2]
WORLD = World(num_frames=3, height=8, width=8, speeds=(0.5, 1.0))


def save_random_wan(folder: Path, seed: int, num_layers: int = 2) -> None:
    """A Wan of random weights, of two blocks or as many as are asked for."""
    torch.manual_seed(seed)
    module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=32,
        freq_dim=16, ffn_dim=40, num_layers=num_layers, rope_max_seq_len=32,
    )  # fmt: skip
    module.save_pretrained(folder)


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a two-block Wan of random weights and the shipped tiny text encoder."""
    folder = tmp_path_factory.mktemp("wan")
    save_random_wan(folder / "transformer", seed=0)
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(REPO / "recipes/tiny_wan" / part, folder / part)
    return folder


@pytest.fixture(scope="session")
def one_block_folder(tmp_path_factory: pytest.TempPathFactory, wan_folder: Path) -> Path:
    """The same with one block: half of the time of a step, a save and a load goes by the number of tensors."""
    folder = tmp_path_factory.mktemp("one_block") / "wan"
    shutil.copytree(wan_folder, folder, ignore=shutil.ignore_patterns("transformer"))
    save_random_wan(folder / "transformer", seed=0, num_layers=1)
    return folder


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory: pytest.TempPathFactory, one_block_folder: Path) -> Path:
    """The same with a second transformer for noise levels below 0.875, as Wan2.2-A14B's."""
    folder = tmp_path_factory.mktemp("pair") / "wan"
    shutil.copytree(one_block_folder, folder)
    save_random_wan(folder / "transformer_2", seed=1, num_layers=1)
    kind = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "transformer": kind, "transformer_2": kind, "boundary_ratio": 0.875}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, wan_folder: Path) -> Path:
    """192 small videos of the moving-shapes world in two shards."""
    folder = tmp_path_factory.mktemp("data") / "world"
    encoder = TextEncoder.from_pretrained(wan_folder)
    write_world_shards(folder, WORLD, encoder, num_samples=192, seed=0, samples_per_shard=96)
    return folder


@pytest.fixture
def recipe_path(tmp_path: Path, write_recipe: Callable[[Path], Path]) -> Path:
    """A recipe for 1 or 2 ranks in a folder of the test's own."""
    return write_recipe(tmp_path)


@pytest.fixture(scope="module")
def write_recipe(
    request: pytest.FixtureRequest, wan_folder: Path, one_block_folder: Path, shards: Path
) -> Callable[[Path], Path]:
    """Writes a recipe of 5 steps of 2 micro-batches, with its run folder beside it; of as many steps as the test's file
    says in `STEPS`, with a network of one block where it says `NUM_BLOCKS = 1`."""
    network = {1: one_block_folder, 2: wan_folder}[getattr(request.module, "NUM_BLOCKS", 2)]
    steps = getattr(request.module, "STEPS", 5)
    return lambda folder: _write_recipe(folder, network, shards, steps)


def _write_recipe(folder: Path, wan_folder: Path, shards: Path, steps: int) -> Path:
    """A recipe whose updates are large and well conditioned: Adam's eps is far above rounding errors."""
    adamw = {"lr": 1e-3, "eps": 1e-3, "betas": [0.5, 0.9]}
    recipe = {
        "run": {"name": "test", "dir": str(folder / "run"), "steps": steps, "seed": 3, "log_every": 1},
        "model": {"family": "wan", "pretrained": str(wan_folder), "compute_dtype": "float32", "text_tokens": 8},
        "objective": {"name": "sgmd"},
        "optim": {"generator": adamw, "fake_score": {**adamw, "lr": 2e-3}, "max_grad_norm": 0.5, "ema": {"decay": 0.9}},
        "data": {"shards": str(shards), "global_batch_size": 2, "micro_batch_size": 1, "lanes": 3, "window": 16},
        "parallel": {"activation_checkpointing": "none"},
        "checkpoint": {"every": 100},
        "logging": {"tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
