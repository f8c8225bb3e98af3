"""The reader: right bytes in order, errors at their place, buffers that nobody loses, threads that end."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reading import read_all
from safetensors.torch import save as save_safetensors
from torch import Tensor
from webdataset.writer import TarWriter

from sgmd_dist.data import worker as worker_module
from sgmd_dist.data.buffers import BufferPool
from sgmd_dist.data.format import CorruptSample, write_negative_prompt
from sgmd_dist.data.index import ShardIndex, consolidate
from sgmd_dist.data.reader import THREAD_NAME_PREFIX, Reader, UnitRequest
from sgmd_dist.data.worker import Worker

TEXT_TOKENS = 5  # the samples have 1 to 7 tokens: some are cut, some padded


def requests_of(index: ShardIndex, size: int, order: list[int] | None = None) -> Iterator[UnitRequest]:
    """All samples in the index's order, or `order`, in units of `size` (of one bucket each)."""
    numbers = list(range(index.num_samples)) if order is None else order
    unit = 0
    for bucket, group in itertools.groupby(numbers, key=lambda number: int(index.bucket[number])):
        members = list(group)
        for start in range(0, len(members), size):
            yield UnitRequest(0, unit, bucket, np.array(members[start : start + size]))
            unit += 1


def open_reader(index: ShardIndex, size: int = 2, order: list[int] | None = None, **options: int) -> Reader:
    return Reader(index, requests_of(index, size, order), micro_batch_size=size, text_tokens=TEXT_TOKENS, **options)


def fitted(embeds: Tensor) -> Tensor:
    padded = torch.zeros(TEXT_TOKENS, embeds.shape[1]).bfloat16()
    padded[: len(embeds)] = embeds[:TEXT_TOKENS]
    return padded


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME_PREFIX)]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("check_crc", [True, False])
def test_every_sample_arrives_in_order_cut_or_padded_to_the_text_tokens(
    two_buckets: ShardIndex, samples: SimpleNamespace, num_threads: int, depth: int, check_crc: bool
) -> None:
    reader = open_reader(two_buckets, 3, num_threads=num_threads, depth=depth, check_crc=check_crc)
    units = read_all(reader)
    assert [unit.request.unit for unit in units] == list(range(len(units)))
    read = [(int(number), unit, row) for unit in units for row, number in enumerate(unit.request.samples)]
    assert [number for number, _, _ in read] == list(range(37))
    for number, unit, row in read:
        assert unit.latents is not None and unit.errors == [None] * len(unit.request.samples)
        bucket = two_buckets.buckets[unit.request.bucket]
        assert torch.equal(unit.latents[row], samples.latents_of(number, bucket))
        assert torch.equal(unit.prompt_embeds[row], fitted(samples.embeds_of(number)))


def test_caption_only_shards_give_no_latents(tmp_path: Path, samples: SimpleNamespace) -> None:
    samples.write(tmp_path, 6, with_latents=False)
    units = read_all(open_reader(consolidate(tmp_path)))
    assert all(unit.latents is None for unit in units)
    assert torch.equal(torch.cat([unit.prompt_embeds for unit in units])[4], fitted(samples.embeds_of(4)))


def test_more_shards_than_open_files(
    dataset: ShardIndex, samples: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_OPEN_FILES_PER_THREAD", 2)
    before = len(os.listdir("/proc/self/fd"))
    order = [shard * 5 + place for place in range(3) for shard in range(5)]
    reader = open_reader(dataset, 1, order, num_threads=2)
    for number in order:
        latents = reader.next().latents
        assert latents is not None and torch.equal(latents[0], samples.latents_of(number))
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_long_headers_and_other_tensors_are_read_past(tmp_path: Path) -> None:
    """A foreign shard may hold further tensors between ours; they count for the crc32 and are dropped."""
    latents, embeds = torch.randn(1, 2, 3, 4).bfloat16(), torch.randn(9, 8).bfloat16()
    extra = {f"a_rather_long_name_of_tensor_number_{i}": torch.randn(3) for i in range(60)}
    data = save_safetensors({"latents": latents, "prompt_embeds": embeds, "mask": torch.randn(5).half(), **extra})
    with open(tmp_path / "foreign.tar", "wb") as file:
        writer = TarWriter(file, encoder=False)
        writer.write({"__key__": "k", "json": b'{"bucket": "b"}', "sample.safetensors": data})
        writer.close()
    (unit,) = read_all(open_reader(consolidate(tmp_path)))
    assert unit.errors == [None] and unit.latents is not None
    assert torch.equal(unit.latents[0], latents) and torch.equal(unit.prompt_embeds[0], embeds[:TEXT_TOKENS])


def test_short_reads_of_the_kernel_are_continued(
    dataset: ShardIndex, samples: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv

    def at_most_seven_bytes(file: int, buffers: list[memoryview], offset: int) -> int:
        return whole(file, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", at_most_seven_bytes)
    for number, unit in enumerate(read_all(open_reader(dataset, 1))):
        assert unit.errors == [None] and unit.latents is not None
        assert torch.equal(unit.latents[0], samples.latents_of(number))


# ------------------------------------------------------------------------------------------------ damage


def overwrite(index: ShardIndex, sample: int, position: int, value: bytes) -> None:
    """Overwrite bytes of a sample's safetensors member; a negative position counts from its end."""
    position += int(index.offset[sample]) + (int(index.size[sample]) if position < 0 else 0)
    with open(index.paths[index.shard[sample]], "r+b") as file:
        file.seek(position)
        file.write(value)


def damage(index: ShardIndex, sample: int, kind: str) -> None:
    path, offset = index.paths[index.shard[sample]], int(index.offset[sample])
    member = path.read_bytes()[offset:][: int(index.size[sample])]
    if kind == "flipped byte":
        overwrite(index, sample, -3, bytes([member[-3] ^ 1]))
    elif kind == "header length":
        overwrite(index, sample, 0, (1 << 40).to_bytes(8, "little"))
    elif kind == "header text":
        overwrite(index, sample, 8, b"?")
    elif kind == "offsets":
        at = member.index(b'"data_offsets":[0,') + len(b'"data_offsets":[')
        overwrite(index, sample, at, b"2")
    elif kind == "dtype":
        overwrite(index, sample, member.index(b"BF16"), b"F16 ")
    elif kind == "name":
        overwrite(index, sample, member.index(b"latents"), b"lantets")
    elif kind == "NaN that the index vouches for":
        overwrite(index, sample, -2, b"\xc0\x7f")
        index.crc32[sample] = zlib.crc32(member[:-2] + b"\xc0\x7f")
    elif kind == "truncated":
        os.truncate(path, offset + int(index.size[sample]) - 5)
    elif kind == "file gone":
        path.unlink()


DAMAGES = {
    "flipped byte": r"crc32 is [0-9a-f]{8}, the index says [0-9a-f]{8}: the bytes are damaged",
    "header length": "safetensors header length 1099511627776 is longer than",
    "header text": "safetensors header is not JSON",
    "offsets": r"'latents' \[4, 2, 3, 6\] BF16 needs 288 bytes, data_offsets \[2, 288\]",
    "dtype": "dtype 'F16 '",
    "name": r"latents is missing, expected bfloat16 \[4, 2, 3, 6\]",
    "NaN that the index vouches for": r"'\w+' holds values that are not finite; encode the sample again",
    "truncated": r"the shard ends at byte \d+, it is truncated",
    "file gone": "No such file or directory",
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_damage_is_delivered_at_its_place_with_shard_key_and_offset(
    dataset: ShardIndex, samples: SimpleNamespace, kind: str, num_threads: int
) -> None:
    victim = 9  # the last of the second shard, and the second of its unit
    damage(dataset, victim, kind)
    first_lost = 5 if kind == "file gone" else victim
    for unit in read_all(open_reader(dataset, 2, num_threads=num_threads)):
        for row, number in enumerate(unit.request.samples.tolist()):
            assert unit.latents is not None
            if not first_lost <= number <= victim:
                assert unit.errors[row] is None
                assert torch.equal(unit.latents[row], samples.latents_of(number))
                continue
            error = unit.errors[row]
            assert isinstance(error, CorruptSample)
            with pytest.raises(CorruptSample, match=DAMAGES[kind]):
                raise error
            where = f"{dataset.paths[1]}: sample '{dataset.keys[number]}' at offset {dataset.offset[number]}: "
            assert str(error).startswith(where) and "\n" not in str(error)
            assert not unit.latents[row].any() and not unit.prompt_embeds[row].any()


def test_without_crc_check_a_flipped_byte_passes(dataset: ShardIndex) -> None:
    damage(dataset, 9, "flipped byte")
    assert all(error is None for unit in read_all(open_reader(dataset, check_crc=False)) for error in unit.errors)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("embed_dim", 9, r"prompt_embeds is bfloat16 \[1, 8\], expected bfloat16 \[n_tokens, 9\]"),
        ("latent_shape", [4, 2, 6, 3], r"latents is bfloat16 \[4, 2, 3, 6\], expected bfloat16 \[4, 2, 6, 3\]"),
        ("latent_shape", [9, 2, 3, 6], r"latents is bfloat16 \[4, 2, 3, 6\], expected bfloat16 \[9, 2, 3, 6\]"),
    ],
)
def test_tensors_of_another_shape_than_the_indexs_are_refused(
    dataset: ShardIndex, field: str, value: object, message: str
) -> None:
    path = dataset.folder / "index.json"
    content = json.loads(path.read_text())
    for record in content["shards"]:
        record[field] = value
    path.write_text(json.dumps(content))
    first = read_all(open_reader(ShardIndex.open(dataset.folder)))[0]
    with pytest.raises(CorruptSample, match=message):
        raise first.errors[0] or AssertionError


# ------------------------------------------------------------------------------------------------ buffers


def test_a_buffer_returns_when_the_last_tensor_on_it_is_gone() -> None:
    pool = BufferPool(num_kept=2)
    first = torch.from_numpy(pool.take(64))
    address = first.data_ptr()
    row = first.view(torch.bfloat16)[3:5]
    del first
    second = torch.from_numpy(pool.take(64))
    assert second.data_ptr() != address  # `row` still looks into the first
    del row
    assert torch.from_numpy(pool.take(64)).data_ptr() == address


def test_the_pool_keeps_no_more_buffers_than_it_may() -> None:
    pool = BufferPool(num_kept=2)
    held = [pool.take(64) for _ in range(10)]
    del held
    assert len(pool._free[64]) == 2


def test_units_that_are_kept_are_never_overwritten(dataset: ShardIndex, samples: SimpleNamespace) -> None:
    order = list(range(20)) * 20
    kept: list[tuple[int, Tensor, Tensor]] = []
    with open_reader(dataset, 1, order, num_threads=2, depth=3) as reader:
        for step, number in enumerate(order):
            unit = reader.next()
            if step % 7 == 0:
                assert unit.latents is not None
                kept.append((number, unit.latents[0], unit.prompt_embeds[0]))
    for number, latents, embeds in kept:
        assert torch.equal(latents, samples.latents_of(number))
        assert torch.equal(embeds, fitted(samples.embeds_of(number)))


def test_a_steady_loop_reuses_its_memory(dataset: ShardIndex) -> None:
    addresses = set()
    with open_reader(dataset, 1, list(range(20)) * 10, depth=3) as reader:
        for _ in range(150):
            addresses.add(reader.next().prompt_embeds.data_ptr())
    assert len(addresses) <= 3 + 2  # in flight, delivered, and one not yet dropped


# ------------------------------------------------------------------------------------------------ threads


def test_reading_ahead_is_bounded(dataset: ShardIndex) -> None:
    taken = []

    def counted() -> Iterator[UnitRequest]:
        for request in requests_of(dataset, 1, list(range(20)) * 5):
            taken.append(request)
            yield request

    with Reader(dataset, counted(), micro_batch_size=1, text_tokens=TEXT_TOKENS, depth=4) as reader:
        for delivered in range(1, 10):
            reader.next()
            assert len(taken) <= delivered + 4


@pytest.mark.parametrize("num_threads", [1, 2])
def test_no_thread_is_left_after_close_even_in_the_middle(dataset: ShardIndex, num_threads: int) -> None:
    reader = open_reader(dataset, 1, list(range(20)) * 100, num_threads=num_threads, depth=50)
    reader.next()
    assert reader_threads()
    started = time.monotonic()
    reader.close()
    reader.close()
    assert time.monotonic() - started < 5
    assert reader_threads() == []
    with pytest.raises(RuntimeError, match="closed"):
        reader.next()


def test_a_bug_in_a_thread_surfaces_and_ends_the_reader(dataset: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Worker, "_fill", broken)
    reader = open_reader(dataset)
    with pytest.raises(ZeroDivisionError):
        reader.next()
    assert reader_threads() == []


def test_the_negative_prompt_is_no_shard(dataset: ShardIndex) -> None:
    write_negative_prompt(dataset.folder, torch.ones(2, 8))
    assert ShardIndex.open(dataset.folder).fingerprint == dataset.fingerprint
