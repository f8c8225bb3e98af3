"""Small data sets on disk, and samples whose content is a function of their number."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sgmd_dist.data.format import write_negative_prompt
from sgmd_dist.data.index import ShardIndex, consolidate
from sgmd_dist.data.shards import ShardWriter

LATENT_SHAPES = {"wide": (4, 2, 3, 6), "tall": (4, 2, 6, 2)}
EMBED_DIM = 8


def latents_of(number: int, bucket: str = "wide") -> Tensor:
    """bf16 latents of sample `number`."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(LATENT_SHAPES[bucket], generator=generator).bfloat16()


def embeds_of(number: int) -> Tensor:
    """bf16 `[1 to 7, D]` text embedding of sample `number`."""
    generator = torch.Generator().manual_seed(10_000 + number)
    return torch.randn(number % 7 + 1, EMBED_DIM, generator=generator).bfloat16()


def write_samples(
    folder: Path,
    count: int,
    *,
    bucket: str = "wide",
    prefix: str = "shard",
    samples_per_shard: int = 5,
    with_latents: bool = True,
    first: int = 0,
) -> None:
    """Write samples `first` ... `first + count - 1` as shards without a consolidated index."""
    with ShardWriter(
        folder, latent_shape=LATENT_SHAPES[bucket], bucket=bucket, prefix=prefix, samples_per_shard=samples_per_shard
    ) as writer:
        for number in range(first, first + count):
            latents = latents_of(number, bucket) if with_latents else None
            writer.add(f"s{number:04d}", embeds_of(number), f"caption {number}", latents=latents, number=number)


def write_dataset(folder: Path, count: int = 23, **options: Any) -> ShardIndex:
    """A complete one-bucket data set folder."""
    write_samples(folder, count, **options)
    write_negative_prompt(folder, embeds_of(3))
    return consolidate(folder)


@pytest.fixture(scope="session")
def two_buckets(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """23 "wide" and 14 "tall" samples, 5 to a shard: read only."""
    folder = tmp_path_factory.mktemp("two_buckets")
    write_samples(folder, 23)
    write_samples(folder, 14, bucket="tall", prefix="tall", first=23)
    write_negative_prompt(folder, embeds_of(3))
    return consolidate(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> ShardIndex:
    """23 samples in 5 shards of a folder that the test may damage."""
    return write_dataset(tmp_path / "data")


@pytest.fixture(scope="session")
def samples() -> SimpleNamespace:
    """The functions above, for the tests of this folder (a conftest is not imported by name)."""
    return SimpleNamespace(
        latents_of=latents_of,
        embeds_of=embeds_of,
        write=write_samples,
        write_dataset=write_dataset,
        latent_shapes=LATENT_SHAPES,
        embed_dim=EMBED_DIM,
    )
