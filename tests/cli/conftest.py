"""A model folder made on the spot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import REPO
from diffusers import WanTransformer3DModel


@pytest.fixture(scope="session")
def local_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with Wan2.1's latents and patches, a one-block transformer, and the tiny text encoder."""
    folder = tmp_path_factory.mktemp("pretrained") / "wan"
    torch.manual_seed(0)
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=40, num_layers=1
    ).save_pretrained(folder / "transformer")
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(REPO / "recipes/tiny_wan" / part, folder / part)
    return folder
