"""Real videos of a data set, to hold generated ones against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.plan import Integers
from sgmd_dist.data.reader import Reader, UnitRequest
from sgmd_dist.data.sources import open_shards, shard_cache
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape, VideoModel
from sgmd_dist.recipe import Recipe


@dataclass(frozen=True)
class RealVideos:
    """The samples with latents of one shape: their places in the index, and the bucket that they are in."""

    index: ShardIndex
    bucket: int
    samples: Integers

    @property
    def num_videos(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """See `ShardIndex.fingerprint`."""
        return self.index.fingerprint

    def latents(self, count: int) -> Tensor:
        """The first `count`, `[count, C, F, H, W]` float32.

        Raises:
            CorruptSample: one cannot be read.
        """
        requests = (UnitRequest(0, unit, self.bucket, self.samples[unit : unit + 1]) for unit in range(count))
        found = []
        with Reader(self.index, requests, micro_batch_size=1, text_tokens=1) as reader:
            for _ in range(count):
                data = reader.next()
                for error in filter(None, data.errors):
                    raise error
                assert data.latents is not None, "the bucket holds latents"
                found.append(data.latents[0].float())
        return torch.stack(found)


def open_real(recipe: Recipe, model: VideoModel, shards: str | None, latent_shape: LatentShape) -> RealVideos:
    """The real videos of `latent_shape` in `shards`, or in the recipe's `data.shards`.

    Raises:
        UserError: the shards are missing, or hold none.
    """
    said = f"data.shards = {recipe.data.shards!r}" if shards is None else f"--real {shards}"
    index = open_shards(recipe, model) if shards is None else ShardIndex.open(shards, shard_cache(recipe))
    for number, name in enumerate(index.buckets):
        if index.latent_shape(name) == latent_shape and not _lack(index, name):
            return RealVideos(index, number, np.flatnonzero(index.bucket == number))
    held = ", ".join(f"{index.latent_shape(name)}{_lack(index, name)}" for name in index.buckets)
    raise UserError(
        f"{said}: holds {held}, expected latents of shape {latent_shape}; name shards of real videos of that shape with"
        " --real, or leave them out with --real none"
    )


def _lack(index: ShardIndex, bucket: str) -> str:
    """Why a bucket's samples are no real videos; empty where they are."""
    if not index.has_latents(bucket):
        return " (captions only)"
    return " (pairs with a teacher's samples)" if index.has_noise(bucket) else ""
