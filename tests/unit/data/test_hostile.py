"""Safetensors headers made to harm: refused by name, before anything of the size that they claim is allocated."""

from __future__ import annotations

import json
import re
import tracemalloc
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from sgmd_dist.data.format import MAX_HEADER_BYTES, CorruptSample, parse_safetensors, safetensors_layout
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.reader import Reader, UnitRequest
from sgmd_dist.data.verify import verify

SMALL_BYTES = 1 << 20


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header; `length` is what it claims to be long."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(shape: Any, offsets: Any, dtype: Any = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


def refusal(data: bytes, bound: int = SMALL_BYTES) -> str:
    """The message with which `data` is refused, having allocated less than `bound` bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(CorruptSample) as error:
            parse_safetensors(memoryview(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bound, f"{peak} bytes"
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and len(message) < 1000, message
    return message


HUGE = 1 << 62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "huge length": (framed(b"{}", length=(1 << 64) - 1), f"header length {(1 << 64) - 1} is longer than the 10 bytes"),
    "length of all there is": (framed(b" " * (4 << 20)), f"is longer than the {MAX_HEADER_BYTES} allowed"),
    "overlap": (framed(header(a=entry([4], [0, 8]), b=entry([4], [4, 12])), bytes(12)), "'b' starts at .* overlap"),
    "twice the same bytes": (framed(header(a=entry([4], [0, 8]), b=entry([4], [0, 8])), bytes(8)), "gap or overlap"),
    "gap": (framed(header(a=entry([2], [0, 4]), b=entry([2], [6, 10])), bytes(10)), "gap or overlap"),
    "backwards": (framed(header(a=entry([4], [8, 0])), bytes(8)), "needs 8 bytes, data_offsets"),
    "negative size": (framed(header(a=entry([-4], [0, 8])), bytes(8)), r"shape \[-4\].*expected counts"),
    "two negative sizes": (framed(header(a=entry([-2, -2], [0, 8])), bytes(8)), "expected counts"),
    "negative offset": (framed(header(a=entry([4], [-8, 0])), bytes(8)), "expected counts"),
    "product beyond 64 bits": (framed(header(a=entry([1 << 32, 1 << 32], [0, 0])), b""), "dims or .* elements"),
    "product of 0 bytes": (framed(header(a=entry([0, HUGE, HUGE], [0, 0])), b""), "dims or .* elements"),
    "many dims": (framed(header(a=entry([1] * 5000, [0, 2])), bytes(2)), "dims or .* elements"),
    "a size of 5000 digits": (framed(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"), "header is not JSON"),
    "a size of 4000 digits": (framed(b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b"]}}"), "expected counts"),
    "bool as a size": (framed(header(a=entry([True], [0, 2])), bytes(2)), r"shape \[True\]"),
    "bool as an offset": (framed(header(a=entry([1], [False, 2])), bytes(2)), r"data_offsets \[False, 2\]"),
    "float as a size": (framed(header(a=entry([4.0], [0, 8])), bytes(8)), r"shape \[4.0\]"),
    "NaN as a size": (framed(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"1"), r"shape \[nan\]"),
    "dtype is a list": (framed(header(a=entry([4], [0, 8], [[1]])), bytes(8)), r"dtype \[\[1\]\]"),
    "a long dtype": (framed(header(a=entry([4], [0, 8], "x" * 100_000)), bytes(8)), "has dtype 'xxx"),
    "a long name": (framed(header(**{"n" * 100_000: 3})), "tensor 'nnn.* has dtype None"),
    "a name that no terminal prints": (framed(header(**{"\ud800\n\x1b[2J": 3})), r"\\ud800\\n\\x1b"),
    "entry is a list": (framed(header(a=[1, 2])), "'a' has dtype None"),
    "the same name twice": (
        framed(b'{"a":' + header(dtype="U8", shape=[1], data_offsets=[0, 1]) + b',"a":3}', b"1"),
        "names 'a' twice",
    ),
    "the same field twice": (
        framed(b'{"a":{"dtype":"U8","shape":[1],"shape":[9],"data_offsets":[0,1]}}', b"1"),
        "names 'shape' twice",
    ),
    "deep nesting": (framed(b"[" * 100_000), "header is not JSON"),
    "deep objects": (framed(b'{"a":' * 40_000), "header is not JSON"),
    "UTF-16": (framed(header(a=entry([1], [0, 2])).decode().encode("utf-16"), bytes(2)), "header is not JSON"),
    "not UTF-8": (framed(b"\xff\xfe"), "header is not JSON"),
    "empty header": (framed(b""), "header is not JSON"),
}  # fmt: skip


# Headers as long as the file allows are parsed: JSON takes some 20 times its text.
BOUND_OF_CASE = {"deep nesting": 8 << 20, "deep objects": 8 << 20}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_crafted_header_is_refused_without_allocation(case: str) -> None:
    data, message = HOSTILE[case]
    assert re.search(message, said := refusal(data, BOUND_OF_CASE.get(case, SMALL_BYTES))), said


def test_the_longest_header_costs_a_bounded_number_of_bytes() -> None:
    """[] is the JSON that takes most memory for its text."""
    text = b"[" + b"[]," * ((MAX_HEADER_BYTES - 20) // 3) + b"[]]"
    assert "JSON list" in refusal(framed(text), 32 * MAX_HEADER_BYTES)


def test_a_crafted_header_in_a_shard_is_named_by_reader_and_verify(dataset: ShardIndex) -> None:
    """In place of a sample's bytes, with an index that does not know of it; the samples around it are read."""
    for case, (data, _) in HOSTILE.items():
        offset, size = int(dataset.offset[6]), int(dataset.size[6])
        if len(data) > size:
            continue
        path = dataset.paths[1]
        whole = path.read_bytes()
        path.write_bytes(whole[:offset] + data.ljust(size, b"\0") + whole[offset + size :])
        requests = iter([UnitRequest(0, n, 0, np.array([n])) for n in range(5, 10)])
        tracemalloc.start()
        with Reader(dataset, requests, micro_batch_size=1, text_tokens=5, check_crc=False) as reader:
            errors = [reader.next().errors[0] for _ in range(5)]
        assert tracemalloc.get_traced_memory()[1] < SMALL_BYTES
        tracemalloc.stop()
        assert [error is not None for error in errors] == [False, True, False, False, False], case
        assert f"{path}: sample 's0006' at offset {offset}: " in str(errors[1])
        named = [mistake for mistake in verify([str(path)]).mistakes if mistake.key == "s0006"]
        assert len(named) == 2 and "crc32 is" in str(named[0]), (case, named)  # and the header
        path.write_bytes(whole)


# ------------------------------------------------------------------------------------------------ any header

SIZES = st.one_of(
    st.integers(0, 9),
    st.sampled_from([-1, -HUGE, 1 << 31, 1 << 32, HUGE, 1 << 63, 1 << 64, 10**300, True, 2.0, None, "4", []]),
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["BF16", "U8", "F64", "BOOL", "F8", "bf16", None, 3, ["BF16"]]),
        "shape": st.one_of(st.lists(SIZES, max_size=4), st.none(), SIZES),
        "data_offsets": st.one_of(st.lists(SIZES, max_size=3), st.none(), SIZES),
        "more": st.none(),
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.one_of(
    st.dictionaries(st.text(max_size=4), ENTRIES | JSON, max_size=3).map(json.dumps), JSON.map(json.dumps)
)


@settings(max_examples=200, deadline=None, database=None)
@given(text=HEADERS, length=st.none() | st.integers(0, 1 << 40), data=st.binary(max_size=40))
@example(text=json.dumps({"a": entry([2, 2], [0, 8])}), length=None, data=bytes(8))
def test_any_header_is_refused_or_describes_exactly_the_bytes_there_are(
    text: str, length: int | None, data: bytes
) -> None:
    file = framed(text.encode(), data, length)
    try:
        spans = safetensors_layout(memoryview(file), len(file))
    except CorruptSample as error:
        message = str(error)
        assert message.isprintable() and len(message) < 1000
        return
    position = 8 + len(text.encode()) if length is None else 8 + length
    for span in spans:
        assert span.begin == position and span.end - span.begin == prod(span.shape) * span.dtype.itemsize
        position = span.end
    assert position == len(file)
    tensors = parse_safetensors(memoryview(file))
    assert all(tensors[span.name].shape == span.shape for span in spans)


@settings(max_examples=200, deadline=None, database=None)
@given(position=st.integers(0, 400), value=st.binary(min_size=1, max_size=12))
def test_any_overwritten_bytes_are_refused_or_harmless(position: int, value: bytes) -> None:
    """A whole file with some of its bytes overwritten: what is still accepted lies inside it."""
    tensors = {"latents": torch.arange(24.0).reshape(2, 3, 4).bfloat16(), "prompt_embeds": torch.ones(2, 8).bfloat16()}
    file = save_safetensors(tensors)
    begin = position % len(file)
    value = value[: len(file) - begin]
    damaged = bytes(file[:begin]) + value + bytes(file[begin + len(value) :])
    try:
        parsed = parse_safetensors(memoryview(damaged))
    except CorruptSample:
        return
    assert sum(tensor.numel() * tensor.element_size() for tensor in parsed.values()) < len(damaged)
