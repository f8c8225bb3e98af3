"""The stream: the same batches at any rank count, thread count and prefetch, and exact resume from one integer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from damaging import flip_last_bytes

from sgmd_dist.batch import Batch
from sgmd_dist.data.format import CorruptSample, write_negative_prompt
from sgmd_dist.data.index import ShardIndex, consolidate
from sgmd_dist.data.reader import THREAD_NAME_PREFIX
from sgmd_dist.data.stream import Stream
from sgmd_dist.errors import UserError

OPTIONS: dict[str, Any] = {"seed": 3, "micro_batch_size": 2, "lanes": 4, "window": 6, "text_tokens": 5}


def open_stream(index: ShardIndex, **options: Any) -> Stream:
    return Stream(index, **{**OPTIONS, **options})


def take(stream: Stream, count: int) -> list[Batch]:
    return [stream.next() for _ in range(count)]


def assert_equal(ours: Iterable[Batch], theirs: Iterable[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ids, a.keys, a.latent_shape) == (b.ids, b.keys, b.latent_shape)
        assert torch.equal(a.prompt_embeds, b.prompt_embeds) and torch.equal(a.valid, b.valid)
        assert a.latents is not None and b.latents is not None and torch.equal(a.latents, b.latents)


@pytest.fixture(scope="module")
def expected(two_buckets: ShardIndex) -> list[Batch]:
    """Two epochs and a bit, read by one rank in one thread."""
    with open_stream(two_buckets) as stream:
        return take(stream, 2 * stream.plan.num_units(0) + 7)


def test_a_batch_holds_the_samples_of_its_unit(
    two_buckets: ShardIndex, expected: list[Batch], samples: SimpleNamespace
) -> None:
    with open_stream(two_buckets) as stream:
        plan = stream.plan
    for number, batch in enumerate(expected):
        epoch, unit = plan.locate(number)
        bucket, members = plan.unit(epoch, unit)
        assert [(i.epoch, i.unit, i.index) for i in batch.ids] == [(epoch, unit, row) for row in range(2)]
        assert batch.latent_shape == two_buckets.latent_shape(bucket) and batch.size == 2
        assert batch.latents is not None and batch.latents.dtype == batch.prompt_embeds.dtype == torch.bfloat16
        for row, sample in enumerate(members.tolist()):
            assert batch.keys[row] == f"s{sample:04d}" and batch.valid[row]
            assert torch.equal(batch.latents[row], samples.latents_of(sample, two_buckets.buckets[bucket]))
            count = min(5, len(samples.embeds_of(sample)))
            assert torch.equal(batch.prompt_embeds[row, :count], samples.embeds_of(sample)[:count])
            assert not batch.prompt_embeds[row, count:].any()
        assert torch.equal(batch.negative_embeds[0, :4], samples.embeds_of(3)[:4])
        assert batch.negative_embeds.shape == (1, 5, 8) and not batch.negative_embeds[0, 4:].any()


def test_an_epoch_weighs_every_sample_once_and_all_batches_have_one_size(
    two_buckets: ShardIndex, expected: list[Batch]
) -> None:
    for epoch in (0, 1):
        batches = [batch for batch in expected if batch.ids[0].epoch == epoch]
        weighed = [key for b in batches for key, valid in zip(b.keys, b.valid.tolist(), strict=True) if valid]
        assert sorted(weighed) == sorted(two_buckets.keys)


def test_a_short_unit_is_filled_with_its_last_sample_at_no_weight(expected: list[Batch]) -> None:
    short = [batch for batch in expected if not bool(batch.valid.all())]
    assert len(short) == 2  # 23 "wide" samples leave one over in each of the two epochs, 14 "tall" ones none
    for batch in short:
        assert batch.valid.tolist() == [True, False] and batch.keys[0] == batch.keys[1]
        assert batch.latents is not None and torch.equal(batch.latents[0], batch.latents[1])
        assert torch.equal(batch.prompt_embeds[0], batch.prompt_embeds[1])
        assert batch.ids[0] != batch.ids[1]


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_ranks_share_the_same_units(
    two_buckets: ShardIndex, expected: list[Batch], dp_size: int, num_threads: int
) -> None:
    count = len(expected) // dp_size
    for rank in range(dp_size):
        with open_stream(two_buckets, dp_rank=rank, dp_size=dp_size, num_threads=num_threads) as stream:
            assert_equal(take(stream, count), expected[rank : count * dp_size : dp_size])


@pytest.mark.parametrize("prefetch_units", [1, 2, 30])
@pytest.mark.parametrize("check_crc", [True, False])
def test_prefetch_and_crc_do_not_change_the_batches(
    two_buckets: ShardIndex, expected: list[Batch], prefetch_units: int, check_crc: bool
) -> None:
    with open_stream(two_buckets, prefetch_units=prefetch_units, check_crc=check_crc, num_threads=2) as stream:
        assert_equal(take(stream, len(expected)), expected)


@pytest.mark.parametrize("position", [0, 1, 5, 18, 19, 20, 26, 37])
def test_restoring_continues_exactly_there(two_buckets: ShardIndex, expected: list[Batch], position: int) -> None:
    with open_stream(two_buckets) as stream:
        take(stream, position)
        state = json.loads(json.dumps(stream.state_dict()))
    assert state["unit"] == position
    with open_stream(two_buckets) as resumed:
        take(resumed, 2)  # what was read before, and read ahead, is dropped
        resumed.load_state_dict(state)
        assert_equal(take(resumed, len(expected) - position), expected[position:])


def test_ranks_may_change_at_every_restart(two_buckets: ShardIndex, expected: list[Batch]) -> None:
    state = open_stream(two_buckets).state_dict()
    position = 0
    for dp_size, steps in ((2, 3), (3, 2), (1, 5), (4, 4)):
        states = []
        for rank in range(dp_size):
            with open_stream(two_buckets, dp_rank=rank, dp_size=dp_size, prefetch_units=rank + 1) as stream:
                stream.load_state_dict(state)
                assert_equal(take(stream, steps), expected[position + rank :: dp_size][:steps])
                states.append(stream.state_dict())
        assert all(s == states[0] for s in states)  # one state for all ranks
        state, position = states[0], position + steps * dp_size
        assert state["unit"] == position


def test_the_state_is_the_plan_the_data_and_one_integer(two_buckets: ShardIndex) -> None:
    with open_stream(two_buckets, dp_size=3, prefetch_units=9) as stream:
        take(stream, 2)
        assert stream.state_dict() == {
            "version": 2,
            "plan": 1,
            "seed": 3,
            "weights": None,
            "max_samples": None,
            "lanes": 4,
            "micro_batch_size": 2,
            "window": 6,
            "history": [],
            "index_sha256": two_buckets.fingerprint,
            "unit": 6,
            "skipped": 0,
        }
        assert (stream.unit, stream.epochs) == (6, [0])


def test_a_state_of_another_run_is_refused_with_every_difference(two_buckets: ShardIndex, tmp_path: Path) -> None:
    with open_stream(two_buckets) as stream:
        take(stream, 3)
        state = stream.state_dict()
        with pytest.raises(UserError) as error:
            stream.load_state_dict({**state, "seed": 4, "weights": [1.0], "index_sha256": "abc"})
        message = str(error.value)
        assert "seed is 3, the checkpoint's 4 (set run.seed" in message
        assert "weights is None, the checkpoint's [1.0] (set data.weights" in message
        assert f"index_sha256 is '{two_buckets.fingerprint}', the checkpoint's 'abc' (point data.shards" in message
        assert "window" not in message and "\n" not in message
        assert stream.state_dict() == state
    for name, other in (("max_samples", 7), ("plan", 2), ("version", 3)):
        with pytest.raises(UserError, match=rf"{name} is .*, the checkpoint's {other} \("):
            open_stream(two_buckets).load_state_dict({**state, name: other})


@pytest.mark.parametrize("value", [-1, 1.5, "3", None, True])
@pytest.mark.parametrize("name", ["unit", "skipped", "lanes"])
def test_a_position_that_is_no_count_is_refused(two_buckets: ShardIndex, name: str, value: object) -> None:
    stream = open_stream(two_buckets)
    with pytest.raises(UserError, match=f"{name} is {value!r}, expected an integer >= {int(name == 'lanes')}"):
        stream.load_state_dict({**stream.state_dict(), name: value})


def test_caption_only_shards_stream_without_latents(tmp_path: Path, samples: SimpleNamespace) -> None:
    samples.write(tmp_path, 9, with_latents=False)
    write_negative_prompt(tmp_path, samples.embeds_of(3))
    with open_stream(consolidate(tmp_path)) as stream:
        batches = take(stream, 5)
    assert all(batch.latents is None for batch in batches)
    assert batches[0].latent_shape == samples.latent_shapes["wide"]
    assert not batches[4].valid[1] and torch.equal(batches[4].prompt_embeds[0], batches[4].prompt_embeds[1])


def test_batches_stay_what_they_were(two_buckets: ShardIndex, expected: list[Batch]) -> None:
    with open_stream(two_buckets, num_threads=2) as stream:
        kept = take(stream, 10)
        take(stream, 30)
    assert_equal(kept, expected[:10])


# ------------------------------------------------------------------------------------------------ errors


def test_raise_names_the_sample_and_keeps_the_position(dataset: ShardIndex) -> None:
    with open_stream(dataset) as stream:
        whole = take(stream, 12)
    flip_last_bytes(dataset, 12)
    place = next(n for n, batch in enumerate(whole) if "s0012" in batch.keys)
    where = rf"shard-000002\.tar: sample 's0012' at offset {dataset.offset[12]}: crc32 is "
    with open_stream(dataset) as stream:
        assert_equal(take(stream, place), whole[:place])
        for _ in range(2):  # the bad unit is not passed over by asking again
            with pytest.raises(CorruptSample, match=where):
                stream.next()
        assert stream.state_dict()["unit"] == place


@pytest.mark.parametrize("num_threads", [1, 2])
def test_skip_delivers_the_position_as_zeros_without_weight(dataset: ShardIndex, num_threads: int) -> None:
    with open_stream(dataset) as stream:
        whole = take(stream, 24)
    flip_last_bytes(dataset, 12, 3)
    with open_stream(dataset, on_error="skip", max_skips=4, num_threads=num_threads) as stream:
        skipping = take(stream, 24)  # two epochs
        assert stream.skipped == stream.state_dict()["skipped"] == 4
    for a, b in zip(skipping, whole, strict=True):
        assert (a.ids, a.keys, a.size) == (b.ids, b.keys, b.size)
        assert a.latents is not None and b.latents is not None
        for row, key in enumerate(a.keys):
            bad = key in ("s0012", "s0003")
            assert bool(a.valid[row]) == (not bad and bool(b.valid[row]))
            assert torch.equal(a.latents[row], torch.zeros_like(a.latents[row]) if bad else b.latents[row])
            assert torch.equal(a.prompt_embeds[row], torch.zeros(5, 8) if bad else b.prompt_embeds[row])


def test_skips_are_bounded_and_counted_over_restarts(dataset: ShardIndex) -> None:
    flip_last_bytes(dataset, 12, 3)
    with open_stream(dataset, on_error="skip", max_skips=2) as stream:
        take(stream, 12)
        state = stream.state_dict()
    assert (state["unit"], state["skipped"]) == (12, 2)
    with open_stream(dataset, on_error="skip", max_skips=2) as stream:
        stream.load_state_dict(state)
        with pytest.raises(UserError, match=r"data\.max_skips: 2: 3 samples could not be read; .* sample 's00(12|03)'"):
            take(stream, 12)
        assert stream.skipped == 3
        with pytest.raises(UserError, match=r"data\.max_skips"):  # asking again does not pass it over
            stream.next()


def test_loading_a_position_clears_an_error(dataset: ShardIndex) -> None:
    flip_last_bytes(dataset, 12)
    with open_stream(dataset) as stream:
        start = stream.state_dict()
        with pytest.raises(CorruptSample):
            take(stream, 12)
        stream.load_state_dict(start)
        assert stream.next().ids[0].unit == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on_error": "ignore"}, r"data\.on_error: 'ignore': expected 'raise' or 'skip'"),
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank 2 of dp_size 2"),
        ({"max_skips": -1}, "max_skips is -1, expected 0 or more"),
        ({"num_threads": 0}, "num_threads is 0, expected 1 or more"),
        ({"text_tokens": 0}, "text_tokens is 0"),
        ({"lanes": 0}, r"data\.lanes: 0"),
    ],
)
def test_wrong_options_are_refused_by_name(two_buckets: ShardIndex, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_stream(two_buckets, **options)


def test_closing_ends_the_threads(two_buckets: ShardIndex) -> None:
    stream = open_stream(two_buckets, num_threads=2)
    stream.next()
    stream.close()
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME_PREFIX)]
    with pytest.raises(RuntimeError, match="closed"):
        stream.next()
