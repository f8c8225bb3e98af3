"""A thread that reads samples: it opens shards, checks headers, fills rows, and repeats what failed for the moment."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import torch

from sgmd_dist.data.buffers import Bytes
from sgmd_dist.data.foreign import crc32_of, fill_foreign
from sgmd_dist.data.format import (
    VIDEO_TENSORS,
    CorruptSample,
    TensorSpan,
    is_finite,
    safetensors_header_bytes,
    safetensors_layout,
)
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.errors import UserError

_HEAD_BYTES = 2048  # a header of two tensors takes some 200 bytes; a longer one is read again
_OPEN_FILES_PER_THREAD = 32
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # before a read is repeated; doubled from one time to the next
_TRANSIENT = frozenset(
    {
        errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO,
        errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN, errno.ESHUTDOWN,
        errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOLINK,
    }
)  # fmt: skip
_PERMANENT_KINDS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def is_transient(error: OSError) -> bool:
    """Whether a read that failed so may succeed later: the network or the disk, not a missing or forbidden file.

    An error without a number (of an HTTP server, say) counts as transient, unless its class says otherwise.
    """
    if error.errno is None:
        return not isinstance(error, _PERMANENT_KINDS)
    return error.errno in _TRANSIENT


def located(index: ShardIndex, sample: int, reason: object) -> CorruptSample:
    """The error of a sample that could not be read: its shard, key and offset, and why."""
    path, key, offset = index.paths[index.shard[sample]], index.keys[sample], index.offset[sample]
    mend = "restore the shard or set data.on_error: skip"
    return CorruptSample(f"{path}: sample '{key}' at offset {offset}: {reason}; {mend}")


@dataclass(frozen=True)
class ReadOptions:
    """How samples are read; see `Reader`. `stopping` is set when no read is to be repeated any more."""

    check_crc: bool = True
    retries: int = 0
    timeout_s: float | None = None
    stopping: threading.Event = field(default_factory=threading.Event)


class Job:
    """One sample to read into its row of a unit's buffer.

    Attributes:
        rows: where the bytes of each tensor go that the unit has, by the tensor's name.
        latent_shape: of the tensors that have it.
        done: locked until `error`, or `bug` for what should not happen, are set.
        dropped: nobody waits for it any more.
    """

    __slots__ = ("_buffer", "bug", "done", "dropped", "error", "latent_shape", "rows", "sample")

    def __init__(self, sample: int, latent_shape: tuple[int, ...], rows: dict[str, Bytes], buffer: Bytes) -> None:
        self.sample, self.latent_shape, self.rows = sample, latent_shape, rows
        self._buffer = buffer  # as long as a thread holds this job, even one that hangs, the buffer is in use
        self.error: CorruptSample | None = None
        self.bug: BaseException | None = None
        self.dropped = False
        self.done = threading.Lock()
        self.done.acquire()

    def clear(self) -> None:
        """Fill the rows with zeros."""
        for row in self.rows.values():
            row[:] = 0


class Worker(threading.Thread):
    """Works on jobs until it finds None among them, or was left behind because it hangs.

    A daemon: the process may end while it hangs. Its files are its own, so that nobody closes what it reads.
    """

    def __init__(self, name: str, index: ShardIndex, jobs: SimpleQueue[Job | None], options: ReadOptions) -> None:
        super().__init__(name=name, daemon=True)
        self._index, self._jobs, self._options = index, jobs, options
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # of the shards used last
        self._scratch: Bytes = np.empty(_HEAD_BYTES, dtype=np.uint8)
        self.job: Job | None = None  # in work
        self.left_behind = False
        self.num_retries = 0

    def run(self) -> None:
        """Take jobs in their order."""
        try:
            while not self.left_behind and (job := self._jobs.get()) is not None:
                self.job = job
                try:
                    job.error = None if job.dropped else self._read(job)
                except BaseException as bug:  # raised in the thread that waits for the job
                    job.bug = bug
                self.job = None
                job.done.release()
                del job  # or its buffer would be in use until the next one comes
            self._jobs.put(None)  # for the next thread
        finally:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _read(self, job: Job) -> CorruptSample | None:
        """Fill a sample's rows; on an error fill them with zeros and return it."""
        options, shard, pause_s = self._options, int(self._index.shard[job.sample]), _FIRST_PAUSE_S
        began = time.monotonic()
        for attempt in itertools.count():
            try:
                self._fill(job, self._file(shard))
                return None
            except (UserError, OSError) as error:
                reason = error
            self._close(shard)  # a file that was replaced, or whose server was away, is opened again
            in_time = options.timeout_s is None or time.monotonic() + pause_s - began < options.timeout_s
            is_hopeful = isinstance(reason, OSError) and is_transient(reason) and attempt < options.retries and in_time
            if not is_hopeful or self.left_behind or options.stopping.wait(pause_s):
                break
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            self.num_retries += 1
        job.clear()
        return located(self._index, job.sample, reason)

    def _file(self, shard: int) -> int:
        if shard not in self._descriptors:
            self._close_given_up()
            while len(self._descriptors) >= _OPEN_FILES_PER_THREAD:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = self._index.open_shard(shard)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def _close_given_up(self) -> None:
        """Close the shards that the node cache has taken away: open ones keep their room on the disk."""
        for shard, descriptor in list(self._descriptors.items()):
            if os.fstat(descriptor).st_nlink == 0:
                self._close(shard)

    def _close(self, shard: int) -> None:
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def _fill(self, job: Job, file: int) -> None:
        check_crc = self._options.check_crc
        if (place := self._index.foreign_place(job.sample)) is not None:
            fill_foreign(file, place, job.latent_shape, self._index.embed_dim, job.rows, check_crc=check_crc)
        else:
            self._fill_own(job, file)
        if check_crc:
            _check_finite(job.rows)

    def _fill_own(self, job: Job, file: int) -> None:
        offset, size = int(self._index.offset[job.sample]), int(self._index.size[job.sample])
        head = np.empty(min(_HEAD_BYTES, size), dtype=np.uint8)
        _read_into(file, [head], offset)
        start = safetensors_header_bytes(head.data, size)
        if start > head.size:
            head = np.empty(start, dtype=np.uint8)
            _read_into(file, [head], offset)
        spans = safetensors_layout(head.data, size)
        image_shape = self._index.held(int(self._index.bucket[job.sample])).image_embeds
        _check_tensors(spans, job, self._index.embed_dim, image_shape)
        parts = self._places(spans, job.rows)
        _read_into(file, parts, offset + start)
        if self._options.check_crc:
            _check_crc([head[:start], *parts], int(self._index.crc32[job.sample]))

    def _places(self, spans: list[TensorSpan], rows: dict[str, Bytes]) -> list[Bytes]:
        """Where the bytes of each tensor go, in file order: into `rows` as far as they fit, the rest into scratch."""
        nothing: Bytes = np.empty(0, dtype=np.uint8)
        kept = [rows.get(span.name, nothing)[: span.end - span.begin] for span in spans]
        dropped = [span.end - span.begin - part.size for span, part in zip(spans, kept, strict=True)]
        if self._scratch.size < sum(dropped):
            self._scratch = np.empty(sum(dropped), dtype=np.uint8)
        scratch, parts = self._scratch, []
        for part, num_bytes in zip(kept, dropped, strict=True):
            parts += [part, scratch[:num_bytes]]
            scratch = scratch[num_bytes:]
        for span, part in zip(spans, kept, strict=True):
            rows.get(span.name, nothing)[part.size :] = 0  # text padding: a reused buffer holds older text
        return [part for part in parts if part.size]


def _check_crc(parts: list[Bytes], expected: int) -> None:
    if (crc32 := crc32_of(*(part.data for part in parts))) != expected:
        raise CorruptSample(f"crc32 is {crc32:08x}, the index says {expected:08x}: the bytes are damaged")


def _check_finite(rows: Mapping[str, Bytes]) -> None:
    """Refuse what only an index that no writer of ours made has a checksum of."""
    for name, row in rows.items():
        if not is_finite(torch.from_numpy(row).view(torch.bfloat16)):
            raise CorruptSample(f"'{name}' holds values that are not finite; encode the sample again")


def _check_tensors(spans: list[TensorSpan], job: Job, width: int, image_shape: tuple[int, ...]) -> None:
    found = {span.name: span for span in spans}
    embeds, shape = found.get("prompt_embeds"), job.latent_shape
    if embeds is None or embeds.dtype != torch.bfloat16 or len(embeds.shape) != 2 or embeds.shape[1] != width:
        raise CorruptSample(f"prompt_embeds is {_describe(embeds)}, expected bfloat16 [n_tokens, {width}]")
    for name, expected in {**dict.fromkeys(VIDEO_TENSORS, shape), "image_embeds": image_shape}.items():
        span = found.get(name)
        if name in job.rows and (span is None or span.dtype != torch.bfloat16 or span.shape != expected):
            raise CorruptSample(f"{name} is {_describe(span)}, expected bfloat16 {list(expected)}")


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
