"""A tiny random Wan and the folders that diffusers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def random_wan(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """A tiny Wan in eval mode whose parameters are all random, also those that diffusers sets to one or zero."""
    torch.manual_seed(seed)
    module = WanTransformer3DModel(**(CONFIG | changes)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.fixture(scope="session")
def wan() -> WanTransformer3DModel:
    return random_wan().requires_grad_(False)


@pytest.fixture
def transformer_folder(wan: WanTransformer3DModel, tmp_path: Path) -> Path:
    """The folder of a transformer alone, in a single file."""
    wan.save_pretrained(tmp_path / "alone")
    return tmp_path / "alone"


@pytest.fixture
def sharded_folder(wan: WanTransformer3DModel, tmp_path: Path) -> Path:
    """The same with its weights cut into several files and their index."""
    wan.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


@pytest.fixture
def pipeline_folder(wan: WanTransformer3DModel, tmp_path: Path) -> Path:
    """A pipeline's folder, as far as this project reads it."""
    folder = tmp_path / "pipeline"
    wan.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "expand_timesteps": False}))
    return folder


@pytest.fixture(scope="session")
def experts() -> dict[str, WanTransformer3DModel]:
    """Two tiny Wans of one architecture, by the name of the expert."""
    return {name: random_wan(seed=seed).requires_grad_(False) for name, seed in (("high", 1), ("low", 2))}


@pytest.fixture
def pair_folder(experts: dict[str, WanTransformer3DModel], tmp_path: Path) -> Path:
    """The folder of a pipeline with two transformers, as Wan2.2-A14B's."""
    folder = tmp_path / "pair"
    experts["high"].save_pretrained(folder / "transformer")
    experts["low"].save_pretrained(folder / "transformer_2", max_shard_size="20KB")
    kind = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "transformer": kind, "transformer_2": kind, "boundary_ratio": 0.875}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
