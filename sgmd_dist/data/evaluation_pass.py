"""A finite pass: every sample once, in a fixed order, the same number of batches on every data-parallel rank."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from loguru import logger

from sgmd_dist.batch import Batch
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.plan import Integers
from sgmd_dist.data.reader import Reader, UnitRequest
from sgmd_dist.data.stream import batch_of, negative_embeds
from sgmd_dist.rng import SampleId


def evaluation_units(
    bucket_of_sample: Integers, *, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1
) -> list[tuple[int, int, Integers]]:
    """The units (number, bucket, samples) of rank `dp_rank`, in order: by bucket, then by sample number, not shuffled.

    The k-th units of all ranks are of one bucket. Each sample is in one unit of one rank. A unit has 0 to
    `micro_batch_size` samples: the last ones of a bucket may have fewer than the others, or none.
    """
    units = []
    first = 0
    for bucket in np.unique(bucket_of_sample).tolist():
        members = np.flatnonzero(bucket_of_sample == bucket)
        rounds = -(-len(members) // (micro_batch_size * dp_size))
        for turn in range(rounds):
            place = turn * dp_size + dp_rank
            samples = members[place * micro_batch_size : (place + 1) * micro_batch_size]
            units.append((first + place, bucket, samples))
        first += rounds * dp_size
    return units


def evaluation_pass(
    index: ShardIndex,
    *,
    micro_batch_size: int,
    text_tokens: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    on_error: Literal["raise", "skip"] = "raise",
    num_threads: int = 1,
    check_crc: bool = True,
) -> Generator[Batch, None, None]:
    """Rank `dp_rank`'s batches of one pass over a data set, each of `micro_batch_size` positions.

    Over all ranks each sample is `valid` at one position. All ranks have equally many batches, the k-th of them of one
    latent shape, filled up with copies at `valid=False`.

    Args:
        text_tokens: T of the prompt embeddings.
        on_error: "raise" a `CorruptSample` that names shard, key and offset, or "skip": warn, and deliver zeros at
            `valid=False`.
        num_threads, check_crc: see `Reader`.
    """
    units = evaluation_units(index.bucket, micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size)
    requests = (
        # An empty unit needs something of its shape to repeat.
        UnitRequest(0, number, bucket, samples if len(samples) else np.flatnonzero(index.bucket == bucket)[-1:])
        for number, bucket, samples in units
    )
    negative = negative_embeds(index, text_tokens)
    with Reader(
        index,
        requests,
        micro_batch_size=micro_batch_size,
        text_tokens=text_tokens,
        num_threads=num_threads,
        check_crc=check_crc,
    ) as reader:
        for number, _, samples in units:
            data = reader.next()
            for error in filter(None, data.errors[: len(samples)]):
                if on_error == "raise":
                    raise error
                logger.warning("left out of the pass: {}", error)
            batch = batch_of(data, index, [SampleId(0, number, row) for row in range(micro_batch_size)], negative)
            yield batch if len(samples) else replace(batch, valid=torch.zeros_like(batch.valid))
