"""The order of training: a pure function of (seed, epoch, number), whose position is one integer.

A *unit* is one micro-batch of one bucket. With L lanes, micro-batches of m and windows of W samples, epoch e is:

1. the shards are put into a random order;
2. the samples of each bucket, by (shard order, number), are cut into L contiguous lanes; each lane is shuffled inside
   consecutive windows of W samples, so that reading stays local;
3. unit l of round t takes samples t m ... (t+1) m - 1 of lane l; a round is L units of one bucket, and a bucket has
   floor(floor(n / L) / m) of them;
4. the rounds of all buckets are interleaved at random;
5. what is left of each bucket, in lane order, becomes tail units at the epoch's end, the last of a bucket may be short.

Every sample occurs exactly once per epoch whatever L, m and W are. The units of epochs 0, 1, ... form one stream,
numbered through from 0: data-parallel rank r of R takes units r, R + r, 2 R + r, ...; nothing else depends on R.
A short unit stays short here; sgmd_dist/data/stream.py fills it up to m with positions of no weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgmd_dist import rng
from sgmd_dist.errors import UserError

PLAN_VERSION = 1  # of the order; a change of it must raise this number, which every saved position carries
_SHARDS, _WINDOWS, _ROUNDS = 1, 2, 3  # purposes of keys
_EPOCHS_KEPT = 2  # prefetch looks over an epoch's end

Integers = NDArray[np.int64]


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`sgmd_dist.rng.splitmix64` of every element; uint64 arithmetic wraps as the scalar's mask does."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys(count: int, seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    """Distinct random 64-bit keys of 0 ... count - 1: chained splitmix64 of (seed, epoch, purpose, number)."""
    state = rng.splitmix64(seed & (1 << 64) - 1)
    for part in (epoch, purpose):
        state = rng.splitmix64(state ^ part)
    return splitmix64(np.arange(count, dtype=np.uint64) ^ np.uint64(state))


@dataclass(frozen=True)
class _Epoch:
    """One epoch's units: `samples[u, :count[u]]` are the sample numbers of unit u, all of bucket `bucket[u]`."""

    samples: Integers  # [units, m]
    count: Integers
    bucket: Integers


class Plan:
    """The order of a data set's samples.

    Args:
        bucket_of_sample: `[N]` integers, the bucket number of each sample.
        shard_of_sample: `[N]` integers, the shard number of each sample.
        seed: of the order.
        lanes: L, how many places of the data set are read side by side. A multiple of the data-parallel size keeps
            each shard on one rank.
        micro_batch_size: m.
        window: W, in samples: how far a sample may move inside its lane.
    """

    def __init__(
        self,
        bucket_of_sample: Integers,
        shard_of_sample: Integers,
        *,
        seed: int,
        lanes: int,
        micro_batch_size: int,
        window: int,
    ) -> None:
        for name, value in (("lanes", lanes), ("micro_batch_size", micro_batch_size), ("window", window)):
            if value < 1:
                raise UserError(f"data.{name}: {value}: expected 1 or more")
        if len(bucket_of_sample) == 0 or len(bucket_of_sample) != len(shard_of_sample):
            raise UserError(
                f"data plan: {len(bucket_of_sample)} buckets for {len(shard_of_sample)} samples: expected one for each "
                "of one sample or more"
            )
        self.seed, self.lanes, self.micro_batch_size, self.window = seed, lanes, micro_batch_size, window
        self._shard = np.asarray(shard_of_sample, dtype=np.int64)
        bucket = np.asarray(bucket_of_sample, dtype=np.int64)
        self._members = [np.flatnonzero(bucket == b) for b in range(int(bucket.max()) + 1)]
        self._rounds = [len(members) // lanes // micro_batch_size for members in self._members]
        full = sum(self._rounds) * lanes
        left = [
            len(members) - r * lanes * micro_batch_size for members, r in zip(self._members, self._rounds, strict=True)
        ]
        self._num_units = full + sum(-(-n // micro_batch_size) for n in left)
        self._epochs: dict[int, _Epoch] = {}

    def num_units(self, epoch: int) -> int:
        """Units of an epoch."""
        if epoch < 0:
            raise ValueError(f"epoch {epoch} is negative")
        return self._num_units

    def locate(self, number: int) -> tuple[int, int]:
        """(epoch, unit in the epoch) of the stream's unit `number` >= 0."""
        if number < 0:
            raise ValueError(f"unit {number} is negative")
        return divmod(number, self._num_units)

    def unit(self, epoch: int, unit: int) -> tuple[int, Integers]:
        """The bucket and the sample numbers, 1 to m of them, of a unit. Do not write into the array."""
        if not 0 <= unit < self.num_units(epoch):
            raise ValueError(f"unit {unit} is not in epoch {epoch} of {self._num_units} units")
        order = self._epoch(epoch)
        return int(order.bucket[unit]), order.samples[unit, : order.count[unit]]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._make_epoch(epoch)
        return self._epochs[epoch]

    def _make_epoch(self, epoch: int) -> _Epoch:
        size = self.micro_batch_size
        shard_order = np.argsort(keys(int(self._shard.max()) + 1, self.seed, epoch, _SHARDS))
        place_of_shard = np.empty_like(shard_order)
        place_of_shard[shard_order] = np.arange(len(shard_order))
        sample_keys = keys(len(self._shard), self.seed, epoch, _WINDOWS)
        labels = np.repeat(np.arange(len(self._members)), self._rounds)
        labels = labels[np.argsort(keys(len(labels), self.seed, epoch, _ROUNDS))]
        rounds = np.empty((len(labels), self.lanes, size), dtype=np.int64)
        samples, counts, buckets = [rounds.reshape(-1, size)], [np.full(rounds.shape[:2], size).ravel()], []
        buckets.append(np.repeat(labels, self.lanes))
        for bucket, members in enumerate(self._members):
            full, left = self._cut(members, self._rounds[bucket], place_of_shard, sample_keys)
            rounds[labels == bucket] = full
            tail, tail_counts = _tail_units(left, size)
            samples.append(tail)
            counts.append(tail_counts)
            buckets.append(np.full(len(tail), bucket))
        return _Epoch(np.concatenate(samples), np.concatenate(counts), np.concatenate(buckets))

    def _cut(
        self, members: Integers, num_rounds: int, place_of_shard: Integers, sample_keys: NDArray[np.uint64]
    ) -> tuple[Integers, Integers]:
        """One bucket's full rounds `[rounds, L, m]` and its samples left over, in lane order."""
        ids = members[np.argsort(place_of_shard[self._shard[members]], kind="stable")]
        cuts = np.arange(self.lanes + 1) * len(ids) // self.lanes
        lane = np.repeat(np.arange(self.lanes), np.diff(cuts))
        place = np.arange(len(ids)) - cuts[lane]
        ids = ids[np.lexsort((sample_keys[ids], place // self.window, lane))]
        taken = num_rounds * self.micro_batch_size  # of every lane
        full = ids[cuts[:-1, None] + np.arange(taken)]  # [L, taken]
        full = full.reshape(self.lanes, num_rounds, self.micro_batch_size).swapaxes(0, 1)
        return full, ids[place >= taken]


def _tail_units(left: Integers, size: int) -> tuple[Integers, Integers]:
    """Left-over samples as `[units, size]` with the number of valid ones in each."""
    num_units = -(-len(left) // size)
    counts = np.minimum(size, len(left) - np.arange(num_units) * size)
    padded = np.zeros(num_units * size, dtype=np.int64)
    padded[: len(left)] = left
    return padded.reshape(num_units, size), counts
