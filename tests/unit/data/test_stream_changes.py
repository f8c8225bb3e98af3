"""The stream over changes: another cut in mid-epoch, mixed data sets, fewer samples, shared skips, memory."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from damaging import flip_last_bytes
from loguru import logger

from sgmd_dist.batch import Batch
from sgmd_dist.data.evaluation_pass import evaluation_pass
from sgmd_dist.data.format import CorruptSample, write_negative_prompt
from sgmd_dist.data.index import ShardIndex, consolidate
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.data.stream import Stream
from sgmd_dist.errors import UserError

OPTIONS: dict[str, Any] = {"seed": 3, "micro_batch_size": 2, "lanes": 4, "window": 6, "text_tokens": 5}


def open_stream(index: ShardIndex, **options: Any) -> Stream:
    return Stream(index, **{**OPTIONS, **options})


def valid_keys(batches: list[Batch]) -> list[str]:
    return [key for b in batches for key, valid in zip(b.keys, b.valid.tolist(), strict=True) if valid]


@pytest.fixture
def pair(tmp_path: Path, samples: SimpleNamespace) -> ShardIndex:
    """Two data sets of 23 and 14 samples."""
    one = samples.write_dataset(tmp_path / "one")
    two = samples.write_dataset(tmp_path / "two", 14, first=23)
    return ShardIndex.open([one.folder, two.folder])


# -- a new cut ----------------------------------------------------------------------------------------------------

CHAIN = [
    (7, {}),
    (3, {"micro_batch_size": 3}),
    (2, {"micro_batch_size": 1, "lanes": 2, "window": 1}),
    (1, {"micro_batch_size": 1, "lanes": 7, "window": 30}),
]


@pytest.mark.parametrize("dp_size", [1, 2])
def test_every_sample_comes_once_whatever_is_changed_in_the_middle(two_buckets: ShardIndex, dp_size: int) -> None:
    state, batches = None, []
    for steps, options in [*CHAIN, (30, {"micro_batch_size": 2})]:
        states = []
        for rank in range(dp_size):
            with open_stream(two_buckets, dp_rank=rank, dp_size=dp_size, **options) as stream:
                if state is not None:
                    stream.load_state_dict(state)
                for _ in range(steps):
                    batches.append(stream.next())
                states.append(json.loads(json.dumps(stream.state_dict())))
        assert all(other == states[0] for other in states)
        state = states[0]
    assert state is not None and len(state["history"]) == 4
    for epoch in (0, 1):
        own = [batch for batch in batches if batch.ids[0].epoch == epoch]
        assert sorted(valid_keys(own)) == sorted(two_buckets.keys)
    ids = [i for batch in batches for i in batch.ids]
    assert len(set(ids)) == len(ids), "no two positions draw the same noise"


def test_a_change_is_announced_and_one_taken_back_unread_leaves_no_trace(two_buckets: ShardIndex) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    with open_stream(two_buckets) as stream:
        for _ in range(5):
            stream.next()
        state = stream.state_dict()
        expected = [stream.next().keys for _ in range(20)]
    with open_stream(two_buckets, lanes=2) as changed:
        changed.load_state_dict(state)
        there = changed.state_dict()
    logger.remove(sink)
    assert lines == ["data.lanes was 4, is 2: what is left of the epoch is put into order anew at unit 5\n"]
    assert there["history"] == [{"lanes": 4, "micro_batch_size": 2, "window": 6, "units": 5}]
    with open_stream(two_buckets) as back:
        back.load_state_dict(there)
        assert back.state_dict() == state
        assert [back.next().keys for _ in range(20)] == expected


def test_a_state_without_history_of_version_1_is_read(two_buckets: ShardIndex) -> None:
    with open_stream(two_buckets) as stream:
        for _ in range(5):
            stream.next()
        state = stream.state_dict()
        old = {k: v for k, v in state.items() if k not in ("weights", "max_samples", "history")}
        expected = stream.next().keys
    with open_stream(two_buckets) as stream:
        stream.load_state_dict({**old, "version": 1})
        assert stream.state_dict() == state and stream.next().keys == expected


@pytest.mark.parametrize(
    "history, message",
    [
        (None, "history is None, expected a list of {lanes, micro_batch_size, units, window}"),
        ([{"lanes": 1, "units": 3}], "history is .*, expected a list"),
        ([{"lanes": 0, "micro_batch_size": 1, "window": 1, "units": 3}], "history is .*, expected a list"),
        ([{"lanes": 1, "micro_batch_size": 1, "window": 1, "units": 9}], "unit is 4, its history has 9"),
    ],
)
def test_a_history_that_is_none_is_refused(two_buckets: ShardIndex, history: object, message: str) -> None:
    with open_stream(two_buckets) as stream:
        with pytest.raises(UserError, match=message):
            stream.load_state_dict({**stream.state_dict(), "unit": 4, "history": history})
        assert stream.unit == 0


# -- mixing and choosing --------------------------------------------------------------------------------------------


def test_entries_are_numbered(pair: ShardIndex) -> None:
    assert pair.entry.tolist() == [0] * 5 + [1] * 3
    assert ShardIndex.open(pair.folder).entry.tolist() == [0] * 5


def test_mixed_data_sets_resume_exactly_at_any_rank_count_and_after_changes(pair: ShardIndex) -> None:
    with open_stream(pair, weights=[3, 1]) as stream:
        whole = [stream.next() for _ in range(60)]
        state = stream.state_dict()
        assert stream.epochs == [3, 2]
    assert (state["unit"], state["weights"]) == (60, [3.0, 1.0])
    share = Counter(key < "s0023" for key in valid_keys(whole))
    assert abs(share[True] - 0.75 * share.total()) <= 2 * 4
    read = {}
    for rank in range(3):
        with open_stream(pair, weights=[3, 1], dp_rank=rank, dp_size=3) as stream:
            stream.load_state_dict({**state, "unit": 21})
            for _ in range(13):
                batch = stream.next()
                read[batch.ids[0].unit] = batch.keys
    assert [read[n] for n in range(21, 60)] == [batch.keys for batch in whole[21:]]
    with open_stream(pair, weights=[3, 1], lanes=3, micro_batch_size=5) as stream:
        stream.load_state_dict(state)
        rest = [stream.next() for _ in range(30)]
    times = Counter(valid_keys([*whole, *rest]))
    for part in (pair.keys[:23], pair.keys[23:]):
        assert max(times[key] for key in part) - min(times[key] for key in part) <= 1
    with (
        open_stream(pair, weights=[1, 1]) as stream,
        pytest.raises(UserError, match=r"weights is \[1.0, 1.0\], the ch"),
    ):
        stream.load_state_dict(state)
    with pytest.raises(UserError, match=r"data\.weights: \[1\.0\]: expected 2"):
        open_stream(pair, weights=[1])


def test_max_samples_uses_the_same_samples_in_every_epoch(pair: ShardIndex) -> None:
    with open_stream(pair, max_samples=10) as stream:
        per_epoch = stream.plan.num_units(0)
        epochs = [valid_keys([stream.next() for _ in range(per_epoch)]) for _ in range(2)]
        assert stream.state_dict()["max_samples"] == 10
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == len(epochs[0]) == 10
    assert epochs[0] != epochs[1]
    assert {key < "s0023" for key in epochs[0]} == {True, False}, "of both data sets, not the first ones"
    with pytest.raises(UserError, match="max_samples is 0, expected 1 or more"):
        open_stream(pair, max_samples=0)
    with pytest.raises(UserError, match=r"data\.max_samples: entry [01] of data\.shards has no sample among them"):
        open_stream(pair, max_samples=1, weights=[1, 1])


# -- finite passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, ranks", [(1, 1), (4, 1), (4, 3), (5, 2)])
def test_a_finite_pass_is_valid_once_for_each_sample(
    two_buckets: ShardIndex, samples: SimpleNamespace, size: int, ranks: int
) -> None:
    passes = [
        list(evaluation_pass(two_buckets, micro_batch_size=size, text_tokens=5, dp_rank=rank, dp_size=ranks))
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in passes}) == 1
    together = [batch for batches in zip(*passes, strict=True) for batch in batches]
    assert valid_keys(together) == two_buckets.keys  # 23 of one bucket, then 14 of the other
    for batches in zip(*passes, strict=True):
        assert len({batch.latent_shape for batch in batches}) == 1
    ids = [i for batch in together for i in batch.ids]
    assert len(set(ids)) == len(ids)
    for batch in together:
        assert batch.size == size and batch.latents is not None and batch.latents.isfinite().all()
        bucket = next(name for name, shape in samples.latent_shapes.items() if shape == batch.latent_shape)
        for row, key in enumerate(batch.keys):
            assert torch.equal(batch.latents[row], samples.latents_of(int(key[1:]), bucket))


def test_a_finite_pass_names_or_leaves_out_what_it_cannot_read(dataset: ShardIndex) -> None:
    flip_last_bytes(dataset, 22)  # the last: padding repeats it
    options: dict[str, Any] = {"micro_batch_size": 4, "text_tokens": 5, "dp_size": 4}
    with pytest.raises(CorruptSample, match=r"sample 's0022' at offset \d+: crc32"):
        list(evaluation_pass(dataset, dp_rank=1, **options))
    passes = [list(evaluation_pass(dataset, dp_rank=rank, on_error="skip", **options)) for rank in range(4)]
    together = [batch for batches in zip(*passes, strict=True) for batch in batches]
    assert valid_keys(together) == dataset.keys[:22]


# -- shared skips ---------------------------------------------------------------------------------------------------


def test_shared_skips_are_left_to_the_caller(dataset: ShardIndex) -> None:
    for sample in (3, 12):
        flip_last_bytes(dataset, sample)
    with open_stream(dataset, on_error="skip", max_skips=4, skips_are_shared=True) as stream:
        for _ in range(12):
            stream.next()
        lost = stream.take_lost()
        assert len(lost) == 2 and stream.take_lost() == [] and stream.skipped == 0
        assert all("offset" in message and "crc32 is" in message for message in lost)
        stream.settle(4, lost)  # other ranks lost two more
        assert stream.state_dict()["skipped"] == 4
        with pytest.raises(UserError, match=r"data\.max_skips: 4: 5 samples could not be read; .*; the last one: x"):
            stream.settle(1, ["x"])


# -- memory ---------------------------------------------------------------------------------------------------------

SAMPLE_BYTES = 256 * 1024


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_streaming_2000_samples_keeps_memory(tmp_path: Path) -> None:
    """Four epochs of 125 MiB: neither what was read nor the data set stays in memory."""
    shape, embeds = (4, 4, 64, 128), torch.ones(3, 8).bfloat16()
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert latents.numel() * 2 == SAMPLE_BYTES
    with ShardWriter(tmp_path, latent_shape=shape, bucket="b", samples_per_shard=100) as writer:
        for number in range(500):
            writer.add(f"{number:04d}", embeds, "a caption", latents=latents)
    write_negative_prompt(tmp_path, embeds)
    with open_stream(consolidate(tmp_path), num_threads=2) as stream:
        for _ in range(50):
            stream.next()
        before = most = resident_bytes()
        for _ in range(1000):
            stream.next()
            most = max(most, resident_bytes())
    assert most - before < 60e6, f"{(most - before) / 1e6:.0f} MB after {2000 * SAMPLE_BYTES / 1e6:.0f} MB"
