"""Reads units of samples ahead, in order, from shards straight into the tensors of a batch.

A sample's safetensors header is read and checked first; then one `preadv` scatters its tensors into their places in the
unit's buffer, so that no byte is copied after the kernel's copy. Nothing is decoded, therefore threads suffice: worker
processes would cost ten times more in copies through shared memory. No mmap: a truncated file would be a SIGBUS.

A read that hangs (a dead file server) cannot be cancelled. Its thread is left behind with its buffer, which only comes
back when that thread is done with it, and another thread takes its place.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgmd_dist.data.buffers import BufferPool
from sgmd_dist.data.format import TENSORS, CorruptSample
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.transfer import Flight, Transfer
from sgmd_dist.data.worker import Job, ReadOptions, Worker, located

THREAD_NAME_PREFIX = "shard-reader"
_ALIGNMENT_BYTES = 64
_CLOSE_S = 5.0  # for which `close` waits for reads in work


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
        noise: of the same shape and dtype, or None for a bucket without pairs.
        condition_latents: likewise, or None for a bucket without images.
        image_embeds: `[m, N, E]` bf16, or None.
        prompt_embeds: `[m, T, D]` bf16, cut or zero-padded to T tokens.
        errors: per requested sample its error, or None. A failed sample's rows are zeros, rows beyond the request
            hold anything.
    """

    request: UnitRequest
    latents: Tensor | None
    prompt_embeds: Tensor
    errors: list[CorruptSample | None]
    noise: Tensor | None = None
    condition_latents: Tensor | None = None
    image_embeds: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}


@dataclass
class _Unit:
    """A unit in flight: its tensors, its jobs, and its way to a device once that is begun."""

    data: UnitData
    jobs: list[Job]
    flight: Flight | None = None

    @property
    def is_read(self) -> bool:
        return not any(job.done.locked() for job in self.jobs)


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
        check_crc: compare every sample's crc32 with the index, and look for values that are not finite. On by default:
            without it a damaged tensor trains silently. It costs some 2.9 ms of a thread's time per 8.4 MB.
        retries: how often a read is repeated that failed for a transient reason, after pauses of 0.5, 1, 2, ... 30 s.
        read_timeout_s: how long `next` waits for a unit, and a read is repeated, until its samples become errors;
            None waits for ever.
        device: where the units' tensors are delivered; on CUDA the next unit is copied there while one is in use.
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
        device: torch.device | None = None,
    ) -> None:
        self._index, self._requests = index, requests
        self._rows, self._text_tokens, self._depth = micro_batch_size, text_tokens, depth
        self._transfer = Transfer(device) if device is not None and device.type == "cuda" else None
        self._pool = BufferPool(num_kept=depth + 2, pinned=self._transfer is not None)
        self._pending: deque[_Unit] = deque()
        self._options = ReadOptions(check_crc, retries, read_timeout_s)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._workers = [self._start_worker() for _ in range(num_threads)]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def retries(self) -> int:
        """How many reads were repeated so far."""
        return sum(worker.num_retries for worker in self._workers)

    def next(self) -> UnitData:
        """The next unit; waits for it. Raises StopIteration after the last request."""
        if self._options.stopping.is_set():
            raise RuntimeError("this reader is closed")
        for request in itertools.islice(self._requests, self._depth - len(self._pending)):
            self._submit(request)
        if not self._pending:
            raise StopIteration
        unit = self._pending.popleft()
        try:
            self._wait(unit)
        except BaseException:  # interrupted, or a bug in a thread
            self.close()
            raise
        data = replace(unit.data, errors=[job.error for job in unit.jobs])
        return data if self._transfer is None else self._landed(unit, data, self._transfer)

    def close(self) -> None:
        """Drop what is in flight, end the threads. May be called twice; leaves a thread behind that hangs in a read."""
        self._options.stopping.set()
        while not self._jobs.empty():
            self._jobs.get()
        self._jobs.put(None)
        until = time.monotonic() + _CLOSE_S
        for worker in self._workers:
            if not worker.left_behind:
                worker.join(max(0.0, until - time.monotonic()))
        self._pending.clear()

    def _start_worker(self) -> Worker:
        worker = Worker(THREAD_NAME_PREFIX, self._index, self._jobs, self._options)
        worker.start()
        return worker

    def _submit(self, request: UnitRequest) -> None:
        unit = self._new_unit(request)
        self._pending.append(unit)
        for job in unit.jobs:
            self._jobs.put(job)

    def _new_unit(self, request: UnitRequest) -> _Unit:
        shapes, starts, num_bytes = self._shapes(request.bucket), {}, 0
        for name, shape in shapes.items():
            starts[name] = -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            num_bytes = starts[name] + 2 * self._rows * prod(shape)
        buffer = self._pool.take(num_bytes)
        memory = torch.from_numpy(buffer).view(torch.bfloat16)
        tensors, rows = {}, {}
        for name, shape in shapes.items():
            start, size = starts[name], 2 * prod(shape)
            rows[name] = buffer[start : start + self._rows * size].reshape(self._rows, size)
            tensors[name] = memory[start // 2 :][: self._rows * size // 2].view(self._rows, *shape)
        jobs = [
            Job(sample, self._index.latent_shape(request.bucket), {name: row[i] for name, row in rows.items()}, buffer)
            for i, sample in enumerate(request.samples.tolist())
        ]
        return _Unit(UnitData(request, errors=[], **{"latents": None, **tensors}), jobs)

    def _shapes(self, bucket: int) -> dict[str, tuple[int, ...]]:
        """Of the tensors that a sample of the bucket has."""
        held = self._index.held(bucket)
        stored = {"latents": held.latents, "noise": held.noise, "condition_latents": held.condition}
        videos = {name: held.latent_shape for name, is_stored in stored.items() if is_stored}
        image = {"image_embeds": held.image_embeds} if held.image_embeds else {}
        return {**videos, **image, "prompt_embeds": (self._text_tokens, self._index.embed_dim)}

    def _wait(self, unit: _Unit) -> None:
        """Wait for a unit's jobs; what is not done in time becomes an error."""
        timeout_s = self._options.timeout_s
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for job in unit.jobs:
            if not job.done.acquire(timeout=-1 if until is None else max(0.0, until - time.monotonic())):
                self._give_up(unit)
                break
            job.done.release()
        for job in unit.jobs:
            if job.bug is not None:
                raise job.bug

    def _give_up(self, unit: _Unit) -> None:
        """Put what there is of a unit into another buffer, and leave its threads and its own buffer to themselves."""
        jobs = unit.jobs
        moved = self._new_unit(unit.data.request)
        for old, new in zip(jobs, moved.jobs, strict=True):
            if old.done.locked():
                old.dropped = True
                new.clear()
                late = f"reading it took longer than {self._options.timeout_s:g} s (data.read_timeout)"
                new.error = located(self._index, old.sample, late)
            else:
                for name, row in new.rows.items():
                    row[:] = old.rows[name]
                new.error, new.bug = old.error, old.bug
        for worker in list(self._workers):
            if worker.job in jobs and not worker.left_behind:
                worker.left_behind = True
                self._workers.append(self._start_worker())
        unit.data, unit.jobs = moved.data, moved.jobs

    def _landed(self, unit: _Unit, data: UnitData, transfer: Transfer) -> UnitData:
        """The unit on the device; its successor, if that is read already, is sent on its way."""
        flight = unit.flight or transfer.begin([*data.tensors.values()])
        if self._pending and self._pending[0].flight is None and self._pending[0].is_read:
            following = self._pending[0]
            following.flight = transfer.begin([*following.data.tensors.values()])
        return replace(data, **dict(zip(data.tensors, flight.land(), strict=True)))
