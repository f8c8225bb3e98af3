"""Reads units of samples ahead, in order, from local shards straight into the tensors of a batch.

A sample's safetensors header is read and checked first; then one `preadv` scatters its tensors into their places in the
unit's buffer, so that no byte is copied after the kernel's copy. Nothing is decoded, therefore threads suffice: worker
processes would cost ten times more in copies through shared memory. No mmap: a truncated file would be a SIGBUS.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgmd_dist.data.foreign import fill_foreign
from sgmd_dist.data.format import CorruptSample, TensorSpan, safetensors_header_bytes, safetensors_layout
from sgmd_dist.data.index import ShardIndex

THREAD_NAME_PREFIX = "shard-reader"
_HEAD_BYTES = 2048  # a header of two tensors takes some 200 bytes; a longer one is read again
_OPEN_FILES_PER_THREAD = 32
_ALIGNMENT_BYTES = 64

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class UnitRequest:
    """One unit to read: its place in the stream, its bucket, and 1 to m sample numbers."""

    epoch: int
    unit: int
    bucket: int
    samples: NDArray[np.int64]


@dataclass(frozen=True)
class UnitData:
    """One unit as read.

    Attributes:
        request: what was asked for.
        latents: `[m, C, F, H, W]` bf16, or None for a bucket of captions only.
        prompt_embeds: `[m, T, D]` bf16, cut or zero-padded to T tokens.
        errors: per requested sample its error, or None. A failed sample's rows are zeros, rows beyond the request
            hold anything.
    """

    request: UnitRequest
    latents: Tensor | None
    prompt_embeds: Tensor
    errors: list[CorruptSample | None]


class BufferPool:
    """Buffers that come back by themselves once no tensor looks into them any more.

    Fresh memory costs as much as the read itself (page faults). A reused buffer must not be one that somebody still
    holds, so its return hangs on the lifetime of the tensors' storage and not on a rule for the caller.
    """

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept  # free buffers of one size
        self._free: dict[int, deque[Bytes]] = {}

    def take(self, num_bytes: int) -> Bytes:
        """A `[num_bytes]` uint8 view of a free or new buffer; `torch.from_numpy` of it keeps the buffer in use."""
        free = self._free.setdefault(num_bytes, deque(maxlen=self._num_kept))
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(num_bytes, dtype=np.uint8)
        view = memory[:]
        # deque.append is atomic: the finalizer may run in any thread.
        weakref.finalize(view, free.append, memory).atexit = False
        return view


class _OpenFiles(threading.local):
    """A thread's most recently used shards; a file is closed only by the thread that reads it."""

    def __init__(self, registry: list[OrderedDict[int, int]]) -> None:
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        registry.append(self._descriptors)

    def get(self, shard: int, index: ShardIndex) -> int:
        if shard not in self._descriptors:
            while len(self._descriptors) >= _OPEN_FILES_PER_THREAD:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = index.open_shard(shard)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]


class _Scratch(threading.local):
    """A thread's room for bytes that are read for their crc32 or to reach what follows, and not kept."""

    def __init__(self) -> None:
        self._bytes: Bytes = np.empty(_HEAD_BYTES, dtype=np.uint8)

    def take(self, num_bytes: int) -> Bytes:
        if self._bytes.size < num_bytes:
            self._bytes = np.empty(num_bytes, dtype=np.uint8)
        return self._bytes[:num_bytes]


class Reader:
    """Delivers the units of `requests` in their order, reading `depth` units ahead in `num_threads` threads.

    An error is delivered in its unit (`UnitData.errors`). `close` (or the end of a `with` block) stops the threads.

    Args:
        index: the data set.
        requests: consumed in the caller's thread, `depth` units before delivery; may be endless.
        micro_batch_size: m, rows of every unit.
        text_tokens: T.
        num_threads: 1 or 2 are enough for page-cache speed; more help where a read waits for the network.
        depth: units in flight; each holds a buffer of m samples.
        check_crc: compare every sample's crc32 with the index. On by default: without it a damaged tensor trains
            silently. It costs 1.3 to 2.4 ms of a thread's time per 8.4 MB.
        retries, read_timeout_s: of a sample's read.
    """

    def __init__(
        self,
        index: ShardIndex,
        requests: Iterator[UnitRequest],
        *,
        micro_batch_size: int,
        text_tokens: int,
        num_threads: int = 1,
        depth: int = 4,
        check_crc: bool = True,
        retries: int = 0,
        read_timeout_s: float | None = None,
    ) -> None:
        self.retries = 0
        self._index, self._requests = index, requests
        self._rows, self._text_tokens, self._depth, self._check_crc = micro_batch_size, text_tokens, depth, check_crc
        self._pool = BufferPool(num_kept=depth + 1)
        self._pending: deque[tuple[UnitRequest, Tensor | None, Tensor, list[Future[CorruptSample | None]]]] = deque()
        self._descriptors: list[OrderedDict[int, int]] = []
        self._files, self._scratch = _OpenFiles(self._descriptors), _Scratch()
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=THREAD_NAME_PREFIX)
        self._closed = False

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self) -> UnitData:
        """The next unit; waits for it. Raises StopIteration after the last request."""
        if self._closed:
            raise RuntimeError("this reader is closed")
        for request in itertools.islice(self._requests, self._depth - len(self._pending)):
            self._submit(request)
        if not self._pending:
            raise StopIteration
        request, latents, prompt_embeds, futures = self._pending.popleft()
        try:
            return UnitData(request, latents, prompt_embeds, [future.result() for future in futures])
        except BaseException:  # interrupted, or a bug in a thread: nothing may write into a buffer that goes back
            self.close()
            raise

    def close(self) -> None:
        """Drop what is in flight, end the threads, close the files. May be called twice."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        for descriptors in self._descriptors:
            while descriptors:
                os.close(descriptors.popitem()[1])

    def _submit(self, request: UnitRequest) -> None:
        shape = self._index.latent_shape(request.bucket)
        stored = self._index.has_latents(request.bucket)
        latent_bytes = 2 * prod(shape) if stored else 0
        text_bytes = 2 * self._text_tokens * self._index.embed_dim
        text_start = -(-self._rows * latent_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        buffer = self._pool.take(text_start + self._rows * text_bytes)
        latent_rows = buffer[: self._rows * latent_bytes].reshape(self._rows, latent_bytes)
        text_rows = buffer[text_start:].reshape(self._rows, text_bytes)
        memory = torch.from_numpy(buffer)
        latents = memory[: self._rows * latent_bytes].view(torch.bfloat16).view(self._rows, *shape) if stored else None
        text = memory[text_start:].view(torch.bfloat16).view(self._rows, self._text_tokens, self._index.embed_dim)
        futures = [
            self._threads.submit(self._read, int(sample), shape if stored else None, latent_rows[i], text_rows[i])
            for i, sample in enumerate(request.samples)
        ]
        self._pending.append((request, latents, text, futures))

    def _read(
        self, sample: int, latent_shape: tuple[int, ...] | None, latents: Bytes, text: Bytes
    ) -> CorruptSample | None:
        """Fill a sample's rows; on an error fill them with zeros and return it."""
        shard = int(self._index.shard[sample])
        try:
            self._fill(sample, self._files.get(shard, self._index), latent_shape, latents, text)
        except (CorruptSample, OSError) as error:
            latents[:], text[:] = 0, 0
            return CorruptSample(
                f"{self._index.paths[shard]}: sample '{self._index.keys[sample]}' at offset "
                f"{self._index.offset[sample]}: {error}; restore the shard or set data.on_error: skip"
            )
        return None

    def _fill(self, sample: int, file: int, latent_shape: tuple[int, ...] | None, latents: Bytes, text: Bytes) -> None:
        if (place := self._index.foreign_place(sample)) is not None:
            width = self._index.embed_dim
            fill_foreign(file, place, latent_shape, width, latents, text, check_crc=self._check_crc)
            return
        offset, size = int(self._index.offset[sample]), int(self._index.size[sample])
        head = np.empty(min(_HEAD_BYTES, size), dtype=np.uint8)
        _read_into(file, [head], offset)
        start = safetensors_header_bytes(head.data, size)
        if start > head.size:
            head = np.empty(start, dtype=np.uint8)
            _read_into(file, [head], offset)
        spans = safetensors_layout(head.data, size)
        self._check_tensors(spans, latent_shape)
        parts = self._places(spans, {"latents": latents, "prompt_embeds": text})
        _read_into(file, parts, offset + start)
        if self._check_crc:
            crc32 = zlib.crc32(head.data[:start])
            for part in parts:
                crc32 = zlib.crc32(part.data, crc32)
            if crc32 != (expected := int(self._index.crc32[sample])):
                raise CorruptSample(f"crc32 is {crc32:08x}, the index says {expected:08x}: the bytes are damaged")

    def _check_tensors(self, spans: list[TensorSpan], latent_shape: tuple[int, ...] | None) -> None:
        found = {span.name: span for span in spans}
        embeds, latents = found.get("prompt_embeds"), found.get("latents")
        width = self._index.embed_dim
        if embeds is None or embeds.dtype != torch.bfloat16 or len(embeds.shape) != 2 or embeds.shape[1] != width:
            raise CorruptSample(f"prompt_embeds is {_describe(embeds)}, expected bfloat16 [n_tokens, {width}]")
        if latent_shape is not None and (
            latents is None or latents.dtype != torch.bfloat16 or latents.shape != latent_shape
        ):
            raise CorruptSample(f"latents is {_describe(latents)}, expected bfloat16 {list(latent_shape)}")

    def _places(self, spans: list[TensorSpan], rows: dict[str, Bytes]) -> list[Bytes]:
        """Where the bytes of each tensor go, in file order: into `rows` as far as they fit, the rest into scratch."""
        nothing: Bytes = np.empty(0, dtype=np.uint8)
        kept = [rows.get(span.name, nothing)[: span.end - span.begin] for span in spans]
        dropped = [span.end - span.begin - part.size for span, part in zip(spans, kept, strict=True)]
        scratch, parts = self._scratch.take(sum(dropped)), []
        for part, num_bytes in zip(kept, dropped, strict=True):
            parts += [part, scratch[:num_bytes]]
            scratch = scratch[num_bytes:]
        for span, part in zip(spans, kept, strict=True):
            rows.get(span.name, nothing)[part.size :] = 0  # text padding: a reused buffer holds older text
        return [part for part in parts if part.size]


def _describe(span: TensorSpan | None) -> str:
    return "missing" if span is None else f"{str(span.dtype).removeprefix('torch.')} {list(span.shape)}"


def _read_into(file: int, parts: list[Bytes], offset: int) -> None:
    """Fill `parts` one after the other with the file's bytes from `offset` on."""
    parts = list(parts)
    while parts:
        num_bytes = os.preadv(file, [part.data for part in parts], offset)
        if num_bytes == 0:
            raise CorruptSample(f"the shard ends at byte {offset}, it is truncated")
        offset += num_bytes
        while parts and num_bytes >= parts[0].size:
            num_bytes -= parts.pop(0).size
        if num_bytes:
            parts[0] = parts[0][num_bytes:]
