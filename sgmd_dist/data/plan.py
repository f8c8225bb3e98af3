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

L, m and W may change at any unit. The samples of that epoch which no unit has taken yet are then put into order anew by
the same five rules, and the epoch's units are counted on, so that no number stands for two units. What the order was
before is the *history*: the parameters of each earlier part with the number of its units. Replaying it gives the place
in the data, so the position stays one integer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgmd_dist import rng
from sgmd_dist.errors import UserError

PLAN_VERSION = 1  # of the order; a change of it must raise this number, which every saved position carries
_SHARDS, _WINDOWS, _ROUNDS, _CHOICE = 1, 2, 3, 4  # purposes of keys
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


def choose(count: int, num_samples: int, seed: int) -> NDArray[np.bool_]:
    """Which of `num_samples` samples a data set of `count` random ones keeps: `[num_samples]` bool.

    A larger count keeps all that a smaller one keeps. `count` at or above `num_samples` keeps all.
    """
    chosen = np.zeros(num_samples, dtype=bool)
    chosen[np.argsort(keys(num_samples, seed, 0, _CHOICE))[:count]] = True
    return chosen


@dataclass(frozen=True)
class Cut:
    """How an epoch is cut into units: L lanes, micro-batches of m samples, windows of W samples."""

    lanes: int
    micro_batch_size: int
    window: int

    def __post_init__(self) -> None:
        for name in ("lanes", "micro_batch_size", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}: {getattr(self, name)}: expected 1 or more")


@dataclass(frozen=True)
class Past:
    """An earlier part of a stream: its cut, and how many units were delivered by it."""

    cut: Cut
    units: int


@dataclass(frozen=True)
class _Epoch:
    """Units of an epoch: `samples[u, :count[u]]` are the sample numbers of unit u, all of bucket `bucket[u]`."""

    samples: Integers  # [units, m]
    count: Integers
    bucket: Integers


@dataclass(frozen=True)
class _Part:
    """The stream from its unit number `first` on, which is unit `unit` of `epoch`, where the cut changed.

    `members` are the samples of each bucket that this epoch has left, `units` of them. All later epochs of the part
    are whole.
    """

    cut: Cut
    first: int
    epoch: int
    unit: int
    members: list[Integers]
    units: int


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
        history: the parts of the stream before the one that L, m and W hold for, oldest first.
        used: `[N]` bool, the samples that the data set consists of; all by default.
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
        history: Sequence[Past] = (),
        used: NDArray[np.bool_] | None = None,
    ) -> None:
        if len(bucket_of_sample) == 0 or len(bucket_of_sample) != len(shard_of_sample):
            raise UserError(
                f"data plan: {len(bucket_of_sample)} buckets for {len(shard_of_sample)} samples: expected one for each "
                "of one sample or more"
            )
        self.seed, self.cut = seed, Cut(lanes, micro_batch_size, window)
        self._shard = np.asarray(shard_of_sample, dtype=np.int64)
        bucket = np.asarray(bucket_of_sample, dtype=np.int64)
        here = np.ones(len(bucket), dtype=bool) if used is None else used
        self._members = [np.flatnonzero((bucket == b) & here) for b in range(int(bucket.max()) + 1)]
        self.num_samples = int(here.sum())
        if self.num_samples == 0:
            raise UserError("data plan: no sample is left; raise data.max_samples")
        self._epochs: dict[tuple[int, int], _Epoch] = {}
        past = [part for part in history if part.units]
        cuts = [*(part.cut for part in past), self.cut]
        self._whole = [num_units(self._members, cut) for cut in cuts]
        self._parts = [_Part(cuts[0], 0, 0, 0, self._members, self._whole[0])]
        for part, cut in zip(past, cuts[1:], strict=True):
            self._parts.append(self._part_after(part.units, cut))

    def num_units(self, epoch: int) -> int:
        """Units of an epoch."""
        if epoch < 0:
            raise ValueError(f"epoch {epoch} is negative")
        number = bisect_right(self._parts, epoch, key=lambda part: part.epoch) - 1
        part = self._parts[number]
        return part.unit + part.units if part.epoch == epoch else self._whole[number]

    def locate(self, number: int) -> tuple[int, int]:
        """(epoch, unit in the epoch) of the stream's unit `number` >= 0."""
        if number < 0:
            raise ValueError(f"unit {number} is negative")
        place = bisect_right(self._parts, number, key=lambda part: part.first) - 1
        part = self._parts[place]
        beyond = number - part.first - part.units
        if beyond < 0:
            return part.epoch, part.unit + number - part.first
        epochs, unit = divmod(beyond, self._whole[place])
        return part.epoch + 1 + epochs, unit

    def unit(self, epoch: int, unit: int) -> tuple[int, Integers]:
        """The bucket and the sample numbers, 1 to m of them, of a unit. Do not write into the array."""
        count = self.num_units(epoch)
        if not 0 <= unit < count:
            raise ValueError(f"unit {unit} is not in epoch {epoch} of {count} units")
        number = bisect_right(self._parts, (epoch, unit), key=lambda part: (part.epoch, part.unit)) - 1
        part = self._parts[number]
        order = self._epoch(number, epoch)
        row = unit - part.unit if epoch == part.epoch else unit
        return int(order.bucket[row]), order.samples[row, : order.count[row]]

    def at(self, number: int) -> tuple[int, int, int, Integers]:
        """(epoch, unit in the epoch, bucket, sample numbers) of the stream's unit `number` >= 0.

        Epoch and unit name a unit of the stream for good: no other has the same two.
        """
        epoch, unit = self.locate(number)
        return epoch, unit, *self.unit(epoch, unit)

    def epochs(self, number: int) -> list[int]:
        """The epoch of the stream's unit `number`, as the only one of a list."""
        return [self.locate(number)[0]]

    def _part_after(self, units: int, cut: Cut) -> _Part:
        """The part that begins with `cut` after `units` units of the last one."""
        part, number = self._parts[-1], len(self._parts) - 1
        first = part.first + units
        epoch, unit = self.locate(first)
        if epoch > part.epoch and unit == 0:
            members = self._members
        else:
            done = unit - part.unit if epoch == part.epoch else unit
            order = self._epoch(number, epoch)
            taken = np.zeros(len(self._shard), dtype=bool)
            rows = np.arange(order.samples.shape[1]) < order.count[:done, None]
            taken[order.samples[:done][rows]] = True
            before = part.members if epoch == part.epoch else self._members
            members = [ids[~taken[ids]] for ids in before]
        return _Part(cut, first, epoch, unit, members, num_units(members, cut))

    def _epoch(self, number: int, epoch: int) -> _Epoch:
        """The units of `epoch` that part `number` holds."""
        if (number, epoch) not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            part = self._parts[number]
            members = part.members if epoch == part.epoch else self._members
            self._epochs[number, epoch] = self._make_epoch(members, part.cut, epoch)
        return self._epochs[number, epoch]

    def _make_epoch(self, members: list[Integers], cut: Cut, epoch: int) -> _Epoch:
        size = cut.micro_batch_size
        shard_order = np.argsort(keys(int(self._shard.max()) + 1, self.seed, epoch, _SHARDS))
        place_of_shard = np.empty_like(shard_order)
        place_of_shard[shard_order] = np.arange(len(shard_order))
        sample_keys = keys(len(self._shard), self.seed, epoch, _WINDOWS)
        num_rounds = [len(ids) // cut.lanes // size for ids in members]
        labels = np.repeat(np.arange(len(members)), num_rounds)
        labels = labels[np.argsort(keys(len(labels), self.seed, epoch, _ROUNDS))]
        rounds = np.empty((len(labels), cut.lanes, size), dtype=np.int64)
        samples, counts, buckets = [rounds.reshape(-1, size)], [np.full(rounds.shape[:2], size).ravel()], []
        buckets.append(np.repeat(labels, cut.lanes))
        for bucket, ids in enumerate(members):
            ids = ids[np.argsort(place_of_shard[self._shard[ids]], kind="stable")]
            full, left = _lanes(ids, cut, num_rounds[bucket], sample_keys)
            rounds[labels == bucket] = full
            tail, tail_counts = _tail_units(left, size)
            samples.append(tail)
            counts.append(tail_counts)
            buckets.append(np.full(len(tail), bucket))
        return _Epoch(np.concatenate(samples), np.concatenate(counts), np.concatenate(buckets))


def num_units(members: Sequence[Integers], cut: Cut) -> int:
    """How many units the samples `members` of each bucket make."""
    size = cut.micro_batch_size
    rounds = [len(ids) // cut.lanes // size for ids in members]
    left = [len(ids) - r * cut.lanes * size for ids, r in zip(members, rounds, strict=True)]
    return sum(rounds) * cut.lanes + sum(-(-n // size) for n in left)


def _lanes(ids: Integers, cut: Cut, num_rounds: int, sample_keys: NDArray[np.uint64]) -> tuple[Integers, Integers]:
    """One bucket's full rounds `[rounds, L, m]` and its samples left over, in lane order, of `ids` in shard order."""
    cuts = np.arange(cut.lanes + 1) * len(ids) // cut.lanes
    lane = np.repeat(np.arange(cut.lanes), np.diff(cuts))
    place = np.arange(len(ids)) - cuts[lane]
    ids = ids[np.lexsort((sample_keys[ids], place // cut.window, lane))]
    taken = num_rounds * cut.micro_batch_size  # of every lane
    full = ids[cuts[:-1, None] + np.arange(taken)]  # [L, taken]
    full = full.reshape(cut.lanes, num_rounds, cut.micro_batch_size).swapaxes(0, 1)
    return full, ids[place >= taken]


def _tail_units(left: Integers, size: int) -> tuple[Integers, Integers]:
    """Left-over samples as `[units, size]` with the number of valid ones in each."""
    num_units = -(-len(left) // size)
    counts = np.minimum(size, len(left) - np.arange(num_units) * size)
    padded = np.zeros(num_units * size, dtype=np.int64)
    padded[: len(left)] = left
    return padded.reshape(num_units, size), counts
