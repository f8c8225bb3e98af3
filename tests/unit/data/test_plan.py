"""The plan's order: exactly once per epoch, independent of ranks, restorable anywhere, and pinned for good."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sgmd_dist import rng
from sgmd_dist.data import plan as plan_module
from sgmd_dist.data.plan import Plan
from sgmd_dist.errors import UserError

GOLDEN_EPOCH_0 = [
    (0, [0, 1]),
    (0, [5, 6]),
    (1, [11, 13]),
    (1, [14, 15]),
    (0, [2, 4]),
    (0, [7, 8]),
    (0, [3, 9]),
    (0, [10]),
    (1, [12, 16]),
    (1, [17]),
]
GOLDEN_EPOCH_1 = [
    (0, [6, 5]),
    (0, [3, 1]),
    (0, [4, 0]),
    (0, [2, 10]),
    (1, [17, 15]),
    (1, [12, 11]),
    (0, [7, 8]),
    (0, [9]),
    (1, [16, 13]),
    (1, [14]),
]


def random_plan(case: int) -> tuple[Plan, np.ndarray, np.ndarray]:
    """A plan over random buckets and shards, sometimes with more lanes or larger units than samples."""
    draw = random.Random(case)
    bucket_of_shard = [draw.randrange(draw.randint(1, 3)) for _ in range(draw.randint(1, 12))]
    sizes = [draw.randint(1, draw.choice([3, 30])) for _ in bucket_of_shard]
    bucket, shard = np.repeat(bucket_of_shard, sizes), np.repeat(np.arange(len(sizes)), sizes)
    plan = Plan(
        bucket,
        shard,
        seed=draw.randrange(1000),
        lanes=draw.choice([1, 2, 3, 4, 8, 50]),
        micro_batch_size=draw.choice([1, 2, 3, 5, 40]),
        window=draw.choice([1, 2, 7, 1000]),
    )
    return plan, bucket, shard


def units_of(plan: Plan, epoch: int) -> list[tuple[int, list[int]]]:
    units = (plan.unit(epoch, u) for u in range(plan.num_units(epoch)))
    return [(bucket, samples.tolist()) for bucket, samples in units]


@pytest.mark.parametrize("case", range(300))
def test_every_sample_occurs_exactly_once_per_epoch_in_a_unit_of_its_bucket(case: int) -> None:
    plan, bucket_of_sample, _ = random_plan(case)
    for epoch in (0, 1, 7):
        units = units_of(plan, epoch)
        assert sorted(s for _, samples in units for s in samples) == list(range(len(bucket_of_sample)))
        assert all(1 <= len(samples) <= plan.cut.micro_batch_size for _, samples in units)
        assert all(bucket_of_sample[s] == bucket for bucket, samples in units for s in samples)


@pytest.mark.parametrize("case", range(100))
def test_at_most_one_unit_per_bucket_is_short(case: int) -> None:
    plan, bucket_of_sample, _ = random_plan(case)
    short = [bucket for bucket, samples in units_of(plan, 2) if len(samples) < plan.cut.micro_batch_size]
    assert len(short) == len(set(short))
    for bucket in set(bucket_of_sample.tolist()):
        assert (bucket in short) == bool((bucket_of_sample == bucket).sum() % plan.cut.micro_batch_size)


@pytest.mark.parametrize("case", range(100))
def test_full_rounds_hold_one_bucket_and_follow_lanes_and_windows(case: int) -> None:
    plan, bucket_of_sample, shard = random_plan(case)
    size, units = plan.cut.micro_batch_size, units_of(plan, 3)
    shard_keys = plan_module.keys(int(shard.max()) + 1, plan.seed, 3, 1)
    for bucket in sorted(set(bucket_of_sample.tolist())):
        ids = np.flatnonzero(bucket_of_sample == bucket)
        in_order = sorted(ids.tolist(), key=lambda i: (shard_keys[shard[i]], i))
        cuts = [lane * len(ids) // plan.cut.lanes for lane in range(plan.cut.lanes + 1)]
        num_rounds = len(ids) // plan.cut.lanes // size
        mine = [samples for b, samples in units if b == bucket]
        for t in range(num_rounds):
            for lane in range(plan.cut.lanes):
                lane_ids = in_order[cuts[lane] : cuts[lane + 1]]
                for i, sample in enumerate(mine[t * plan.cut.lanes + lane]):
                    window = (t * size + i) // plan.cut.window
                    assert sample in lane_ids[window * plan.cut.window : (window + 1) * plan.cut.window]
    full = sum(int((bucket_of_sample == b).sum()) // plan.cut.lanes // size for b in set(bucket_of_sample.tolist()))
    for t in range(full):
        assert len({bucket for bucket, _ in units[t * plan.cut.lanes : (t + 1) * plan.cut.lanes]}) == 1


@pytest.mark.parametrize("case", range(60))
def test_ranks_share_the_units_and_a_restart_continues_at_any_rank_count(case: int) -> None:
    plan, _, _ = random_plan(case)
    total = 3 * plan.num_units(0) + 1
    whole = [plan.unit(*plan.locate(n))[1].tolist() for n in range(total)]
    draw = random.Random(case)
    position, seen = 0, {}
    while position < total:  # a new number of ranks after every few steps, with a new plan as after a restart
        plan, _, _ = random_plan(case)
        ranks = draw.randint(1, 5)
        for k in range(draw.randint(1, 4)):
            for rank in range(ranks):
                number = position + k * ranks + rank
                assert number not in seen
                seen[number] = plan.unit(*plan.locate(number))[1].tolist()
        position = len(seen)
    assert [seen[n] for n in range(total)] == whole


def test_units_are_numbered_through_over_epoch_ends() -> None:
    plan = Plan(np.zeros(10, int), np.zeros(10, int), seed=0, lanes=2, micro_batch_size=3, window=4)
    assert plan.num_units(0) == 4
    assert [plan.locate(n) for n in (0, 3, 4, 9)] == [(0, 0), (0, 3), (1, 0), (2, 1)]


def test_epochs_and_seeds_give_different_orders() -> None:
    bucket, shard = np.zeros(200, int), np.arange(200) // 10
    orders = [
        units_of(Plan(bucket, shard, seed=seed, lanes=4, micro_batch_size=2, window=50), epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2))
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_buckets_are_mixed_over_the_epoch() -> None:
    bucket = np.repeat([0, 1], 200)
    plan = Plan(bucket, np.arange(400) // 10, seed=0, lanes=2, micro_batch_size=2, window=50)
    first_half = [b for b, _ in units_of(plan, 0)[:100]]
    assert 30 < sum(first_half) < 70


def test_lookups_in_any_order_of_epochs_agree() -> None:
    plan, _, _ = random_plan(5)
    forward = {e: units_of(plan, e) for e in range(4)}
    assert {e: units_of(plan, e) for e in (3, 0, 2, 1, 0)} == {e: forward[e] for e in (3, 0, 2, 1)}


def test_vectorised_keys_equal_the_scalar_mixer() -> None:
    values = np.array([0, 1, 12345, 2**63, 2**64 - 1], dtype=np.uint64)
    assert plan_module.splitmix64(values).tolist() == [rng.splitmix64(int(v)) for v in values]
    state = rng.splitmix64(rng.splitmix64(rng.splitmix64(-3 & (2**64 - 1)) ^ 5) ^ 2)
    assert plan_module.keys(4, -3, 5, 2).tolist() == [rng.splitmix64(state ^ i) for i in range(4)]


def test_the_order_is_pinned() -> None:
    """These numbers never change: a checkpoint's position means nothing under another order."""
    bucket, shard = np.array([0] * 11 + [1] * 7), np.array([0] * 4 + [1] * 4 + [2] * 3 + [3] * 4 + [4] * 3)
    plan = Plan(bucket, shard, seed=7, lanes=2, micro_batch_size=2, window=3)
    assert plan_module.PLAN_VERSION == 1
    assert units_of(plan, 0) == GOLDEN_EPOCH_0
    assert units_of(plan, 1) == GOLDEN_EPOCH_1


@pytest.mark.parametrize("name", ["lanes", "micro_batch_size", "window"])
def test_parameters_below_one_are_refused_by_name(name: str) -> None:
    parameters = {"lanes": 1, "micro_batch_size": 1, "window": 1, name: 0}
    with pytest.raises(UserError, match=rf"data\.{name}: 0: expected 1 or more"):
        Plan(np.zeros(3, int), np.zeros(3, int), seed=0, **parameters)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(UserError, match="one sample or more"):
        Plan(np.zeros(0, int), np.zeros(0, int), seed=0, lanes=1, micro_batch_size=1, window=1)


@pytest.mark.parametrize("epoch, unit", [(0, -1), (0, 4), (-1, 0)])
def test_positions_outside_the_plan_are_refused(epoch: int, unit: int) -> None:
    plan = Plan(np.zeros(10, int), np.zeros(10, int), seed=0, lanes=2, micro_batch_size=3, window=4)
    with pytest.raises(ValueError, match=r"is negative|is not in epoch"):
        plan.unit(epoch, unit)
