"""The families beside Wan are trained on two ranks as in one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from running import State, parameter_difference, train_unsaved
from tiny_families import FAMILIES, TEXT_WIDTH

from sgmd_dist.data.format import write_negative_prompt

TOLERANCE = 1e-6


def keys(name: str, folder: Path, shards: Path) -> list[str]:
    """The family's keys, with data whose negative prompt is as long as its texts where their padding counts."""
    tokens, data = FAMILIES[name].config.get("max_text_seq_length", 8), folder / "shards"
    if not data.exists():
        shutil.copytree(shards, data)
        write_negative_prompt(data, torch.ones(tokens, TEXT_WIDTH))
    return [
        f"model={{family: {name}, pretrained: {FAMILIES[name].save(folder / name)}, compute_dtype: float32,"
        f" text_tokens: {tokens}}}",
        f"data.shards={data}",
        "run.steps=2",
    ]


def trained(recipe_path: Path, shards: Path, name: str, world_size: int, *parallel: str) -> State:
    overrides = [*keys(name, recipe_path.parent, shards), *parallel, f"run.dir={recipe_path.parent}/{world_size}"]
    return run_ranks(world_size, train_unsaved, recipe_path, overrides)[0]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_two_ranks_train_as_one(recipe_path: Path, shards: Path, name: str) -> None:
    """Sharded, with recomputed blocks; and where the family can, with sequences on 2 x 2 ranks."""
    kept = "selective" if name == "hunyuan_video_15" else "block"  # its attention is torch's own, for its mask
    one = trained(recipe_path, shards, name, 1)
    two = trained(recipe_path, shards, name, 2, f"parallel.activation_checkpointing={kept}")
    assert parameter_difference(one, two) < TOLERANCE
    if FAMILIES[name].splits_sequences:
        shared = trained(recipe_path, shards, name, 4, "parallel.ulysses=2", "parallel.ring=2")
        assert parameter_difference(one, shared) < TOLERANCE
    moved = max(float((one["generator"][k] - one["generator.ema"][k]).abs().max()) for k in one["generator"])
    assert moved > 1e-4
