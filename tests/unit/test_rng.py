"""Randomness is a function: pinned values, so that a run can be repeated by any later version on any machine."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sgmd_dist import rng
from sgmd_dist.rng import SampleId


def test_splitmix64_is_the_published_one() -> None:
    """First outputs of the reference implementation for the seeds 0 and 1234567."""
    assert rng.splitmix64(0) == 0xE220A8397B1DCDAF
    assert rng.splitmix64(1234567) == 6457827717110365317


def test_keys_are_pinned() -> None:
    assert rng.key(0, "a") == 9573976062430154869
    assert rng.key(0, "a", 0) == 1502307931222245571
    assert rng.key(1, "rollout", 2, 3) == 2504568118502411758


def test_scalars_are_pinned() -> None:
    assert rng.uniform(1, "rollout", 2, 3) == 0.13577290976091227
    assert [rng.integer(4, 1, "rollout/exit", step) for step in range(8)] == [0, 2, 1, 3, 3, 2, 0, 2]
    assert rng.permutation(8, 1, "order", 5) == [5, 2, 0, 4, 6, 7, 3, 1]


@pytest.mark.parametrize(
    "draw, expected",
    [
        ((1, "rollout", 0, 0), [-0.3834714, 1.4995732, -0.5871740]),
        ((1, "rollout", 1, 0), [1.4510347, -0.8467243, 0.3190377]),
        ((1, "fake_rollout", 1, 0), [-0.4245426, 0.1971950, 0.4891626]),
        ((1, "a", 1, 0), [-1.2111790, -1.3001087, 1.3296962]),
    ],
)
def test_noise_is_pinned(draw: tuple[int, str, int, int], expected: list[float]) -> None:
    assert rng.normal((3,), *draw).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("purpose", ["rollout", "fake_rollout"])
def test_noise_starts_philox_at_the_whole_key(purpose: str) -> None:
    """All 128 bits: (key, purpose number), whatever the sizes of the two."""
    number = rng._purpose_number(purpose)
    for counter in range(16):
        philox = np.random.Philox(key=np.array([rng.key(3, purpose, counter), number], dtype=np.uint64))
        expected = np.random.Generator(philox).standard_normal((5,), dtype=np.float32)
        assert rng.normal((5,), 3, purpose, counter).tolist() == expected.tolist(), f"counter {counter}"


def test_a_draw_depends_on_nothing_that_was_drawn_before() -> None:
    first = rng.normal((4,), 0, "noise", 1)
    torch.manual_seed(123)
    np.random.seed(5)
    for i in range(10):
        rng.normal((7,), 0, "noise", i)
        rng.uniform(0, "noise", i)
    assert torch.equal(rng.normal((4,), 0, "noise", 1), first)


def test_a_draw_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1]
    rng.normal((100,), 0, "noise", 1)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_every_part_of_a_key_matters() -> None:
    """Seeds, purposes, counters, their order and their number."""
    keys = [
        rng.key(seed, purpose, *counters)
        for seed in (0, 1, 2**62)
        for purpose in ("", "a", "b", "ab", "a/b")
        for counters in ((), (0,), (0, 0), (1,), (0, 1), (1, 0), (2**63,), (-1,))
    ]
    assert len(set(keys)) == len(keys)


def test_many_keys_without_a_collision() -> None:
    grid = itertools.product(range(4), range(20), range(20))
    assert len({rng.key(seed, "noise", unit, index) for seed, unit, index in grid}) == 1600


def test_uniform_fills_the_unit_interval() -> None:
    draws = np.array([rng.uniform(3, "u", i) for i in range(20000)])
    assert draws.min() >= 0 and draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 20000))
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8, "chi-squared with 19 degrees of freedom, p = 0.001"
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / math.sqrt(20000)


def test_uniform_never_reaches_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "key", lambda *parts: 2**64 - 1)
    assert rng.uniform(0, "u") < 1 and rng.integer(7, 0, "u") == 6


@pytest.mark.parametrize("high", [1, 3, 4, 1000])
def test_integer_covers_its_range_evenly(high: int) -> None:
    counts = np.bincount([rng.integer(high, 0, "i", k) for k in range(8000)], minlength=high)
    assert len(counts) == high
    assert ((counts - 8000 / high) ** 2 / (8000 / high)).sum() < high + 4.5 * math.sqrt(2 * high) + 5


def test_choice_follows_its_weights_and_never_takes_one_of_0() -> None:
    counts = np.bincount([rng.choice([1.0, 0.0, 2.0, 5.0, 0.0], 3, "exit", step) for step in range(4000)], minlength=5)
    assert counts / 4000 == pytest.approx([1 / 8, 0, 2 / 8, 5 / 8, 0], abs=0.03)
    assert [rng.choice([1.0, 2.0, 3.0, 4.0], 1, "rollout/exit", step) for step in range(8)] == [1, 2, 2, 3, 3, 2, 0, 3]


def test_choice_keeps_to_positive_weights_where_a_draw_is_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "key", lambda *_: (1 << 64) - 1)
    assert rng.choice([1.0, 1e-30, 0.0], 0, "exit") == 0, "1 + 1e-30 is 1"
    assert rng.choice([0.1, 0.2, 0.7, 0.0], 0, "exit") == 2


@pytest.mark.parametrize("weights", [[], [0.0, 0.0]])
def test_choice_of_nothing_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="expected a sum above 0"):
        rng.choice(weights, 0, "exit")


def test_permutation_is_one_and_every_order_occurs() -> None:
    assert rng.permutation(0, 0, "p") == [] and rng.permutation(1, 0, "p") == [0]
    assert sorted(rng.permutation(100, 0, "p", 3)) == list(range(100))
    orders = [tuple(rng.permutation(3, 0, "p", i)) for i in range(600)]
    assert {order: orders.count(order) for order in set(orders)} == {
        order: pytest.approx(100, abs=40) for order in itertools.permutations(range(3))
    }


def test_normal_is_standard_normal_float32_on_the_cpu() -> None:
    x = rng.normal((50, 400), 0, "noise", 1)
    assert x.shape == (50, 400) and x.dtype == torch.float32 and x.device.type == "cpu"
    assert x.mean().item() == pytest.approx(0, abs=4 / math.sqrt(20000))
    assert x.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / 20000))
    assert (x**3).mean().item() == pytest.approx(0, abs=4 * math.sqrt(15 / 20000))
    assert (x**4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / 20000))


def test_noises_of_different_purposes_counters_and_seeds_are_uncorrelated() -> None:
    draws = [(0, "a", 0), (0, "b", 0), (0, "a", 1), (1, "a", 0), (0, "a", 0, 0)]
    noises = np.stack([rng.normal((4000,), *draw).numpy() for draw in draws])
    off_diagonal = np.corrcoef(noises) - np.eye(len(draws))
    assert np.abs(off_diagonal).max() < 4.5 / math.sqrt(4000)


def test_sample_draws_follow_the_sample_and_not_its_place_in_the_batch() -> None:
    ids = [SampleId(0, 5, 0), SampleId(0, 5, 1), SampleId(1, 5, 0), SampleId(0, 6, 0)]
    noise = rng.sample_normal((2, 3), 9, "noise", ids, 4, device="cpu")
    u = rng.sample_uniform(9, "u", ids, 4, device="cpu")
    assert noise.shape == (4, 2, 3) and u.shape == (4,) and u.dtype == torch.float64
    order = [2, 0, 3, 1]
    shuffled = [ids[i] for i in order]
    assert torch.equal(rng.sample_normal((2, 3), 9, "noise", shuffled, 4, device="cpu"), noise[order])
    assert torch.equal(rng.sample_uniform(9, "u", shuffled, 4, device="cpu"), u[order])
    assert len(set(u.tolist())) == 4 and len(set(noise[:, 0, 0].tolist())) == 4
    assert torch.equal(noise[1], rng.normal((2, 3), 9, "noise", 0, 5, 1, 4))
    assert u[1].item() == rng.uniform(9, "u", 0, 5, 1, 4)


def test_a_batchs_draws_are_those_of_its_samples_one_by_one() -> None:
    ids = [SampleId(0, 0, 0), SampleId(2, 2**40, 63), SampleId(2**63, 2**64 - 1, 1), SampleId(-1, 3, 0)]
    for seed, counters in itertools.product((0, 2**64 - 1, -5), ((), (0,), (2**63, 7))):
        noise = rng.sample_normal((3, 2), seed, "noise", ids, *counters, device="cpu")
        u = rng.sample_uniform(seed, "u", ids, *counters, device="cpu")
        for row, each, i in zip(noise, u, ids, strict=True):
            assert torch.equal(row, rng.normal((3, 2), seed, "noise", i.epoch, i.unit, i.index, *counters))
            assert each.item() == rng.uniform(seed, "u", i.epoch, i.unit, i.index, *counters)


def test_a_samples_noise_does_not_depend_on_the_sample_before() -> None:
    """An odd number of values leaves half a word of the generator behind."""
    ids = [SampleId(0, 0, i) for i in range(3)]
    noise = rng.sample_normal((5,), 0, "noise", ids, device="cpu")
    assert torch.equal(noise[2:], rng.sample_normal((5,), 0, "noise", ids[2:], device="cpu"))
