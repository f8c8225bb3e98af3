"""The order of several data sets mixed in fixed proportions: a pure function of the unit's number.

Each data set keeps a plan of its own, with epochs of its own. The stream takes *rounds*, L consecutive units of one
data set; a schedule says whose round comes when. After any number of rounds, each data set has had its share of them to
less than one round. Shares are of samples: a data set whose epochs end in short units gets more rounds for it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sgmd_dist.data.plan import Cut, Integers, Past, Plan, num_units
from sgmd_dist.errors import UserError

LONGEST_PERIOD = 1 << 14  # rounds; shares are rounded to it where their own period is longer


class Schedule:
    """Whose round comes when: data set e has `shares[e]` of the rounds, to less than one round at any time.

    The rounds are those of jobs that arrive at even distances, taken by the earliest deadline among those that have
    arrived; this meets all deadlines, which is the bound. It repeats after `period` rounds. Where the shares have no
    common denominator up to `LONGEST_PERIOD`, they are rounded to it, by one round in so many at most.

    Args:
        shares: of the rounds, above 0; their sum does not matter.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        total = sum(shares)
        shares = [share / total for share in shares]
        period = math.lcm(*(share.denominator for share in shares))
        if period > LONGEST_PERIOD:
            period = LONGEST_PERIOD
        self.rounds = _apportion(shares, period)  # of each data set in a period
        self.period = sum(self.rounds)
        self._entry = np.empty(self.period, dtype=np.int64)
        self._turn = np.empty(self.period, dtype=np.int64)
        turns = [0] * len(shares)
        for t in range(self.period):
            arrived = [e for e, count in enumerate(self.rounds) if turns[e] * self.period <= t * count]
            entry = min(arrived, key=lambda e: -(-(turns[e] + 1) * self.period // self.rounds[e]))
            self._entry[t], self._turn[t] = entry, turns[entry]
            turns[entry] += 1

    def at(self, number: int) -> tuple[int, int]:
        """(data set, which of its rounds) of round `number`, both from 0."""
        periods, t = divmod(number, self.period)
        entry = int(self._entry[t])
        return entry, periods * self.rounds[entry] + int(self._turn[t])

    def before(self, number: int) -> list[int]:
        """How many of the first `number` rounds each data set has."""
        periods, t = divmod(number, self.period)
        begun = np.bincount(self._entry[:t], minlength=len(self.rounds))
        return [periods * rounds + int(n) for rounds, n in zip(self.rounds, begun, strict=True)]


@dataclass(frozen=True)
class _Part:
    """The stream from unit `first` on: the schedule, and how many units of each data set came before."""

    first: int
    lanes: int
    schedule: Schedule
    starts: list[int]

    def units(self, number: int) -> list[int]:
        """How many units of each data set come before unit `number` of the stream."""
        rounds, rest = divmod(number - self.first, self.lanes)
        units = [start + n * self.lanes for start, n in zip(self.starts, self.schedule.before(rounds), strict=True)]
        if rest:
            units[self.schedule.at(rounds)[0]] += rest
        return units


class Mixture:
    """The order of several data sets in fixed proportions.

    Args:
        bucket_of_sample, shard_of_sample, seed, lanes, micro_batch_size, window, history, used: as of a `Plan`, of all
            data sets together.
        entry_of_sample: `[N]` integers, the number of each sample's data set.
        weights: of the samples of each data set, above 0; their sum does not matter.
    """

    def __init__(
        self,
        bucket_of_sample: Integers,
        shard_of_sample: Integers,
        entry_of_sample: Integers,
        weights: Sequence[float],
        *,
        seed: int,
        lanes: int,
        micro_batch_size: int,
        window: int,
        history: Sequence[Past] = (),
        used: NDArray[np.bool_] | None = None,
    ) -> None:
        if len(weights) != (num_entries := int(entry_of_sample.max()) + 1):
            raise UserError(f"data.weights: {list(weights)}: expected {num_entries}, one for each entry of data.shards")
        self.seed, self.cut = seed, Cut(lanes, micro_batch_size, window)
        here = [(entry_of_sample == e) if used is None else (entry_of_sample == e) & used for e in range(num_entries)]
        for e, samples in enumerate(here):
            if not samples.any():
                raise UserError(f"data.max_samples: entry {e} of data.shards has no sample among them; raise it")
        buckets = int(bucket_of_sample.max()) + 1
        members = [[np.flatnonzero(own & (bucket_of_sample == b)) for b in range(buckets)] for own in here]
        past = [part for part in history if part.units]
        exact = [Fraction(repr(float(weight))) for weight in weights]
        self._parts: list[_Part] = []
        pasts: list[list[Past]] = [[] for _ in here]
        first, starts = 0, [0] * num_entries
        for number, cut in enumerate([*(part.cut for part in past), self.cut]):
            rates = [weight * _units_per_sample(own, cut) for weight, own in zip(exact, members, strict=True)]
            part = _Part(first, cut.lanes, Schedule(rates), starts)
            self._parts.append(part)
            if number < len(past):
                first += past[number].units
                starts = part.units(first)
                for entry, (begin, end) in enumerate(zip(part.starts, starts, strict=True)):
                    pasts[entry].append(Past(cut, end - begin))
        self._plans = [
            Plan(
                bucket_of_sample,
                shard_of_sample,
                seed=seed,
                lanes=lanes,
                micro_batch_size=micro_batch_size,
                window=window,
                history=pasts[entry],
                used=own,
            )
            for entry, own in enumerate(here)
        ]

    def at(self, number: int) -> tuple[int, int, int, Integers]:
        """(0, `number`, bucket, sample numbers) of the stream's unit `number` >= 0.

        The data sets have epochs of their own, the stream has none: the number alone names the unit.
        """
        part = self._part(number)
        turn, lane = divmod(number - part.first, part.lanes)
        entry, turn = part.schedule.at(turn)
        plan = self._plans[entry]
        _, _, bucket, samples = plan.at(part.starts[entry] + turn * part.lanes + lane)
        return 0, number, bucket, samples

    def epochs(self, number: int) -> list[int]:
        """The epoch of each data set's next unit when the stream is at unit `number`."""
        units = self._part(number).units(number)
        return [plan.locate(unit)[0] for plan, unit in zip(self._plans, units, strict=True)]

    def _part(self, number: int) -> _Part:
        if number < 0:
            raise ValueError(f"unit {number} is negative")
        return self._parts[bisect_right(self._parts, number, key=lambda part: part.first) - 1]


def _units_per_sample(members: Sequence[Integers], cut: Cut) -> Fraction:
    """Units of an epoch over its samples: 1 / m, and more where some are short."""
    return Fraction(num_units(members, cut), sum(map(len, members)))


def _apportion(shares: Sequence[Fraction], period: int) -> list[int]:
    """Rounds of each of the `shares`, whose sum is 1: `period` in all by the largest remainders, one at least."""
    exact = [share * period for share in shares]
    rounds = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda e: rounds[e] - exact[e])
    for e in by_remainder[: period - sum(rounds)]:
        rounds[e] += 1
    return [max(count, 1) for count in rounds]
