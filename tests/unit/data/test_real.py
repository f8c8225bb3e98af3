"""Real videos to hold generated ones against: which shards have them, and which of them are taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sgmd_dist.assemble import build_model
from sgmd_dist.data.format import write_negative_prompt
from sgmd_dist.data.index import consolidate
from sgmd_dist.data.real import RealVideos, open_real
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape
from sgmd_dist.recipe import Recipe

SHAPE: LatentShape = (3, 2, 4, 4)


def video(number: int, shape: LatentShape = SHAPE) -> Tensor:
    return torch.full(shape, float(number), dtype=torch.bfloat16)


def write(folder: Path, count: int, shape: LatentShape = SHAPE, *, latents: bool = True, noise: bool = False) -> str:
    """Shards of `count` samples; sample i's latents are all i."""
    embeds = torch.zeros(2, 32, dtype=torch.bfloat16)
    with ShardWriter(folder, latent_shape=shape, bucket="x".join(map(str, shape))) as writer:
        for number in range(count):
            tensors = {"latents": video(number, shape)} if latents else {}
            tensors |= {"noise": video(0, shape)} if noise else {}
            writer.add(f"{number:04d}", embeds, "a caption", **tensors)
    write_negative_prompt(folder, embeds)
    consolidate(folder)
    return str(folder)


@pytest.fixture
def opened(tiny_recipe: Callable[..., Recipe]) -> Callable[[str], RealVideos]:
    recipe = tiny_recipe()
    return lambda shards: open_real(recipe, build_model(recipe, "generator"), shards, SHAPE)


def test_the_first_videos_are_taken(opened: Callable[[str], RealVideos], tmp_path: Path) -> None:
    real = opened(write(tmp_path / "shards", 5))
    assert real.num_videos == 5
    latents = real.latents(3)
    assert latents.dtype == torch.float32 and latents.shape == (3, *SHAPE)
    assert latents[:, 0, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "shape, held, said",
    [
        (SHAPE, {"latents": False}, "captions only"),
        (SHAPE, {"noise": True}, "pairs with a teacher's samples"),
        ((3, 2, 4, 6), {}, r"holds \(3, 2, 4, 6\), expected latents of shape \(3, 2, 4, 4\)"),
    ],
)
def test_shards_of_something_else_are_refused(
    shape: LatentShape, held: dict[str, bool], said: str, opened: Callable[[str], RealVideos], tmp_path: Path
) -> None:
    shards = write(tmp_path / "shards", 2, shape, **held)
    with pytest.raises(UserError, match=said):
        opened(shards)
