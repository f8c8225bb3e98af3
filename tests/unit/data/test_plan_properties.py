"""Properties of the order over any data set, cut, chain of rank counts and history of changes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgmd_dist.data.evaluation_pass import evaluation_units
from sgmd_dist.data.mixture import LONGEST_PERIOD, Mixture, Schedule
from sgmd_dist.data.plan import Cut, Past, Plan, choose
from sgmd_dist.errors import UserError

settings.register_profile("stable", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("stable")

GOLDEN_SHA256 = "62ba924aaf0f86a5b6cd8cf99be0b41c893bee4c4895104165e57b119bf75120"


@dataclass(frozen=True)
class DataSet:
    bucket: np.ndarray
    shard: np.ndarray
    entry: np.ndarray
    seed: int

    def plan(self, cut: Cut, history: list[Past], used: np.ndarray | None = None) -> Plan:
        return Plan(self.bucket, self.shard, seed=self.seed, **asdict(cut), history=history, used=used)

    def mixture(self, weights: list[float], cut: Cut, history: list[Past]) -> Mixture:
        options: dict[str, Any] = {"seed": self.seed, **asdict(cut), "history": history}
        return Mixture(self.bucket, self.shard, self.entry, weights, **options)


@st.composite
def data_sets(draw: st.DrawFn, max_entries: int = 1) -> DataSet:
    """Shards of one bucket each, some data sets smaller than a round."""
    shards = st.tuples(st.integers(1, 30), st.integers(0, 2))  # samples, bucket
    entries = draw(st.lists(st.lists(shards, min_size=1, max_size=5), min_size=max_entries, max_size=max_entries))
    flat = [(size, bucket, entry) for entry, own in enumerate(entries) for size, bucket in own]
    sizes = [size for size, _, _ in flat]
    return DataSet(
        bucket=np.repeat([bucket for _, bucket, _ in flat], sizes),
        shard=np.repeat(np.arange(len(flat)), sizes),
        entry=np.repeat([entry for _, _, entry in flat], sizes),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


cuts = st.builds(Cut, st.sampled_from([1, 2, 3, 4, 8, 50]), st.sampled_from([1, 2, 3, 5, 40]), st.integers(1, 40))
histories = st.lists(st.builds(Past, cuts, st.integers(0, 40)), max_size=4)
weight_lists = st.lists(st.integers(1, 30).map(lambda n: n / 10), min_size=1, max_size=4)
share_lists = st.lists(st.builds(Fraction, st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=6)


def length(history: list[Past]) -> int:
    return sum(past.units for past in history)


@given(data_sets(), cuts)
def test_every_sample_comes_once_per_epoch_in_a_unit_of_its_bucket(data: DataSet, cut: Cut) -> None:
    plan = data.plan(cut, [])
    for epoch in (0, 3):
        units = [plan.unit(epoch, unit) for unit in range(plan.num_units(epoch))]
        assert sorted(np.concatenate([samples for _, samples in units])) == list(range(len(data.bucket)))
        for bucket, samples in units:
            assert 1 <= len(samples) <= cut.micro_batch_size and set(data.bucket[samples]) == {bucket}


@given(data_sets(), cuts, st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=6))
def test_any_chain_of_rank_counts_reads_what_one_rank_reads(
    data: DataSet, cut: Cut, parts: list[tuple[int, int]]
) -> None:
    alone, position = data.plan(cut, []), 0
    for ranks, calls in parts:
        plan = data.plan(cut, [])  # as after a restart
        read = {
            position + k * ranks + rank: plan.at(position + k * ranks + rank)
            for rank in range(ranks)
            for k in range(calls)
        }
        position += ranks * calls
        for number, (*place, samples) in read.items():
            *expected, expected_samples = alone.at(number)
            assert place == expected and np.array_equal(samples, expected_samples)


@given(data_sets(), histories, cuts)
def test_every_sample_comes_once_per_epoch_whatever_was_changed_and_when(
    data: DataSet, history: list[Past], cut: Cut
) -> None:
    plan = data.plan(cut, history)
    last_epoch = plan.locate(length(history))[0] + 1
    seen: dict[int, list[int]] = {}
    ids = []
    number = 0
    while plan.locate(number)[0] <= last_epoch:
        epoch, unit, bucket, samples = plan.at(number)
        assert set(data.bucket[samples]) == {bucket} and len(samples) >= 1
        seen.setdefault(epoch, []).extend(samples.tolist())
        ids.append((epoch, unit))
        number += 1
    everything = list(range(len(data.bucket)))
    assert {epoch: sorted(samples) for epoch, samples in seen.items()} == dict.fromkeys(
        range(last_epoch + 1), everything
    )
    assert ids == [(e, u) for e in range(last_epoch + 1) for u in range(plan.num_units(e))], "ids count on, none twice"


@given(data_sets(), histories, cuts)
def test_a_history_changes_nothing_of_what_was_read(data: DataSet, history: list[Past], cut: Cut) -> None:
    """Each part is what it was when it was the present one; a whole epoch after the change is that of the new cut."""
    plan = data.plan(cut, history)
    first = 0
    for number, past in enumerate(history):
        then = data.plan(past.cut, history[:number])
        for unit in range(first, first + past.units):
            assert plan.at(unit)[:3] == then.at(unit)[:3]
            assert np.array_equal(plan.at(unit)[3], then.at(unit)[3])
        first += past.units
    epoch, fresh = plan.locate(first)[0] + 1, data.plan(cut, [])
    assert plan.num_units(epoch) == fresh.num_units(epoch)
    for unit in range(fresh.num_units(epoch)):
        assert np.array_equal(plan.unit(epoch, unit)[1], fresh.unit(epoch, unit)[1])


# -- weights ----------------------------------------------------------------------------------------------------


@given(share_lists)
def test_a_schedule_keeps_every_share_to_less_than_a_round_at_any_time(shares: list[Fraction]) -> None:
    schedule = Schedule(shares)
    counts = [0] * len(shares)
    for t in range(min(2 * schedule.period, 500)):
        entry, turn = schedule.at(t)
        assert turn == counts[entry], "a data set's rounds come in their order"
        counts[entry] += 1
        for count, rounds in zip(counts, schedule.rounds, strict=True):
            assert abs(count - Fraction(rounds * (t + 1), schedule.period)) < 1
    assert schedule.before(t + 1) == counts


@pytest.mark.parametrize(
    "shares, is_exact",
    [
        ([Fraction(7, 10), Fraction(3, 10)], True),
        ([Fraction(1, 9999), Fraction(9998, 9999)], True),
        ([Fraction(1, 99991), Fraction(1, 99989), Fraction(3, 7)], False),
        ([Fraction(1, 3), Fraction(1, 7), Fraction(1, 9973)], False),
        ([Fraction(1, 10**9), Fraction(1, 10**9), Fraction(1)], False),
    ],
)
def test_shares_are_exact_or_rounded_to_the_longest_period(shares: list[Fraction], is_exact: bool) -> None:
    schedule = Schedule(shares)
    errors = [abs(Fraction(n, schedule.period) - s / sum(shares)) for n, s in zip(schedule.rounds, shares, strict=True)]
    assert (max(errors) == 0) == is_exact
    assert max(errors) <= Fraction(len(shares), LONGEST_PERIOD)
    assert min(schedule.rounds) >= 1, "every data set has its turn"


@given(st.data(), weight_lists, cuts, st.lists(st.builds(Past, cuts, st.integers(0, 60)), max_size=2))
def test_mixed_data_sets_keep_their_epochs_and_their_shares(
    draws: st.DataObject, weights: list[float], cut: Cut, history: list[Past]
) -> None:
    data = draws.draw(data_sets(max_entries=len(weights)))
    mixture = data.mixture(weights, cut, history)
    first, rounds = length(history), 20
    units = [mixture.at(number) for number in range(first + rounds * cut.lanes)]
    assert [unit[:2] for unit in units] == [(0, number) for number in range(len(units))]
    for entry in range(len(weights)):
        own = [s for _, _, _, samples in units for s in samples.tolist() if data.entry[s] == entry]
        times, size = Counter(own), int((data.entry == entry).sum())
        most, least = max(times.values(), default=0), min(times[s] for s in np.flatnonzero(data.entry == entry))
        assert most - least <= 1, "no sample comes again before all of its data set came"
        assert len(own) // size == least
    for _, _, bucket, samples in units:
        assert set(data.bucket[samples]) == {bucket} and len(set(data.entry[samples])) == 1
    counts = np.bincount([int(data.entry[samples[0]]) for *_, samples in units[first:]], minlength=len(weights))
    sizes = [np.bincount(data.bucket[data.entry == entry]) for entry in range(len(weights))]
    epoch_units = [data.plan(cut, [], data.entry == entry).num_units(0) for entry in range(len(weights))]
    rates = np.array(
        [w * n / size.sum() for w, n, size in zip(weights, epoch_units, sizes, strict=True)], dtype=np.float64
    )
    error = np.abs(counts / cut.lanes - rounds * rates / rates.sum())
    assert (error < 1 + rounds * len(weights) / LONGEST_PERIOD).all()


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 2], [0.05, 0.95]])
def test_shares_are_of_samples_at_any_number_of_rounds(weights: list[float]) -> None:
    """12 samples in fours, 7 in fours (the last of three), 100: short units are made up for."""
    sizes = [12, 7, 100][: len(weights)]
    entry = np.repeat(np.arange(len(sizes)), sizes)
    data = DataSet(np.zeros(len(entry), int), entry, entry, seed=5)
    mixture = data.mixture(weights, Cut(lanes=2, micro_batch_size=4, window=3), [])
    seen = np.zeros(len(sizes))
    share = np.array(weights) / sum(weights)
    for number in range(1500):
        samples = mixture.at(number)[3]
        seen[entry[samples[0]]] += len(samples)
        if number % 2:
            assert (np.abs(seen - share * seen.sum()) <= 2 * 4 + 4).all(), "a round and a short unit"


@given(st.data(), cuts, st.integers(0, 300))
def test_the_epochs_of_a_mixture_are_those_of_its_next_units(draws: st.DataObject, cut: Cut, number: int) -> None:
    data = draws.draw(data_sets(max_entries=2))
    mixture = data.mixture([1.0, 2.0], cut, [])
    seen = Counter(s for n in range(number) for s in mixture.at(n)[3].tolist())
    least = [min(seen[s] for s in np.flatnonzero(data.entry == entry)) for entry in (0, 1)]
    assert mixture.epochs(number) == least


def test_weights_for_another_number_of_entries_are_refused() -> None:
    data = DataSet(np.zeros(3, int), np.zeros(3, int), np.array([0, 1, 1]), seed=0)
    with pytest.raises(UserError, match=r"data\.weights: \[1\.0\]: expected 2, one for each entry"):
        data.mixture([1.0], Cut(1, 1, 1), [])


# -- max_samples, finite passes, the golden order -----------------------------------------------------------------


@given(st.integers(1, 200), st.integers(0, 250), st.integers(0, 250), st.integers(0, 2**63 - 1))
def test_more_samples_contain_fewer(num_samples: int, fewer: int, more: int, seed: int) -> None:
    fewer, more = sorted((fewer, more))
    small, large = choose(fewer, num_samples, seed), choose(more, num_samples, seed)
    assert small.sum() == min(fewer, num_samples) and large.sum() == min(more, num_samples)
    assert not (small & ~large).any()


@given(data_sets(), cuts, st.integers(1, 40))
def test_a_plan_of_chosen_samples_has_these_alone(data: DataSet, cut: Cut, count: int) -> None:
    used = choose(count, len(data.bucket), data.seed)
    plan = data.plan(cut, [], used)
    samples = np.concatenate([plan.unit(2, unit)[1] for unit in range(plan.num_units(2))])
    assert sorted(samples) == np.flatnonzero(used).tolist()


@given(data_sets(), st.integers(1, 6), st.integers(1, 7))
def test_a_finite_pass_has_each_sample_once_and_equal_shapes_on_all_ranks(data: DataSet, size: int, ranks: int) -> None:
    passes = [
        evaluation_units(data.bucket, micro_batch_size=size, dp_rank=rank, dp_size=ranks) for rank in range(ranks)
    ]
    assert len({len(units) for units in passes}) == 1
    in_order = []
    for units in zip(*passes, strict=True):
        assert len({bucket for _, bucket, _ in units}) == 1
        assert [number % ranks for number, _, _ in units] == list(range(ranks))
        in_order += [sample for _, _, samples in units for sample in samples.tolist()]
    assert in_order == sorted(range(len(data.bucket)), key=lambda s: (data.bucket[s], s))
    numbers = sorted(number for units in passes for number, _, _ in units)
    assert numbers == list(range(len(numbers)))


def test_the_order_of_a_larger_data_set_is_pinned() -> None:
    """This number never changes: a checkpoint's position means nothing under another order."""
    sizes = [40, 17, 33, 8, 25, 61, 12, 50]
    bucket, shard = np.repeat([0, 1, 0, 2, 1, 0, 2, 0], sizes), np.repeat(np.arange(8), sizes)
    data = DataSet(bucket, shard, np.repeat([0, 0, 0, 1, 1, 1, 2, 2], sizes), seed=11)
    cut, history = Cut(4, 3, 16), [Past(Cut(2, 4, 8), 37), Past(Cut(8, 1, 5), 60)]
    orders = [data.plan(cut, []), data.plan(cut, history), data.mixture([0.5, 0.2, 0.3], cut, history)]
    content = [[(*unit[:3], unit[3].tolist()) for unit in map(order.at, range(300))] for order in orders]
    content.append(np.flatnonzero(choose(50, len(bucket), 11)).tolist())
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest() == GOLDEN_SHA256
