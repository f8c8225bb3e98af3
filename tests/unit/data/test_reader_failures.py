"""Reads that fail for the moment are repeated; reads that hang become errors, and their buffers are never reused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reading import read_all
from torch import Tensor

from sgmd_dist.data import reader as reader_module
from sgmd_dist.data import worker as worker_module
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.reader import Reader, UnitRequest
from sgmd_dist.data.worker import is_transient

REPO = Path(__file__).parents[3]
WHOLE_PREADV = os.preadv
Preadv = Callable[[int, list[memoryview], int], int]


def open_reader(index: ShardIndex, size: int = 1, **options: Any) -> Reader:
    return Reader(index, _requests(index, size), micro_batch_size=size, text_tokens=5, **options)


def _requests(index: ShardIndex, size: int) -> Iterator[UnitRequest]:
    for unit, start in enumerate(range(0, index.num_samples, size)):
        yield UnitRequest(0, unit, 0, np.arange(start, min(start + size, index.num_samples)))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_FIRST_PAUSE_S", 0.01)


def failing(times: int, error: OSError) -> Preadv:
    """A `preadv` that fails so many times and then works."""
    left = iter(range(times))

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        if next(left, None) is not None:
            raise error
        return WHOLE_PREADV(file, buffers, offset)

    return preadv


@pytest.mark.parametrize(
    "error, transient",
    [
        (OSError(errno.EIO, "I/O error"), True),
        (OSError(errno.ESTALE, "stale"), True),
        (ConnectionResetError("reset"), True),
        (TimeoutError("late"), True),
        (OSError("503 Service Unavailable"), True),
        (FileNotFoundError("s3://bucket/gone.tar"), False),
        (OSError(errno.ENOENT, "gone"), False),
        (OSError(errno.EACCES, "forbidden"), False),
        (OSError(errno.ENOSPC, "full"), False),
    ],
)
def test_only_what_may_pass_is_transient(error: OSError, transient: bool) -> None:
    assert is_transient(error) is transient


def test_a_transient_failure_is_repeated_and_counted(
    dataset: ShardIndex, samples: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", failing(2, OSError(errno.ESTALE, "stale file handle")))
    reader = open_reader(dataset, retries=2)
    units = read_all(reader)
    assert reader.retries == 2
    for number, unit in enumerate(units):
        assert unit.errors == [None] and unit.latents is not None
        assert torch.equal(unit.latents[0], samples.latents_of(number))


def test_a_shard_that_was_put_back_is_opened_again(dataset: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor of the file that failed is of no use any more."""
    opened: list[str] = []
    whole_open = os.open

    def counted(path: os.PathLike[str], flags: int) -> int:
        opened.append(os.fspath(path))
        return whole_open(path, flags)

    monkeypatch.setattr(os, "preadv", failing(1, OSError(errno.EIO, "I/O error")))
    monkeypatch.setattr(os, "open", counted)
    assert all(unit.errors == [None] for unit in read_all(open_reader(dataset, retries=1)))
    assert opened.count(os.fspath(dataset.paths[0])) == 2 and len(opened) == len(dataset.paths) + 1


@pytest.mark.parametrize(
    "times, error, message",
    [(3, OSError(errno.EIO, "I/O error"), "I/O error"), (1, OSError(errno.EACCES, "forbidden"), "forbidden")],
)
def test_retries_end_and_a_permanent_failure_has_none(
    dataset: ShardIndex, monkeypatch: pytest.MonkeyPatch, times: int, error: OSError, message: str
) -> None:
    monkeypatch.setattr(os, "preadv", failing(times, error))
    reader = open_reader(dataset, retries=2)
    first, *others = read_all(reader)
    assert message in str(first.errors[0]) and dataset.keys[0] in str(first.errors[0])
    assert reader.retries == times - 1
    assert all(unit.errors == [None] for unit in others)


def test_closing_does_not_wait_for_a_pause(dataset: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr(os, "preadv", failing(10**9, OSError(errno.EIO, "I/O error")))
    reader = open_reader(dataset, retries=5, read_timeout_s=0.05)
    first = reader.next()
    assert first.errors[0] is not None
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < 3


# ------------------------------------------------------------------------------------------------ hanging


class Hanging:
    """A `preadv` that hangs at one place of one shard until `resume` is set."""

    def __init__(self, index: ShardIndex, sample: int) -> None:
        self.resume, self.returned = threading.Event(), threading.Event()
        self._inode = index.paths[index.shard[sample]].stat().st_ino
        self._first = int(index.offset[sample])
        self._end = self._first + int(index.size[sample])

    def __call__(self, file: int, buffers: list[memoryview], offset: int) -> int:
        is_body = self._first < offset < self._end and os.fstat(file).st_ino == self._inode
        if not is_body:
            return WHOLE_PREADV(file, buffers, offset)
        self.resume.wait(30)
        for buffer in buffers:
            buffer[:] = b"\xff" * len(buffer)
        self.returned.set()
        return sum(len(buffer) for buffer in buffers)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_a_read_that_hangs_becomes_an_error_and_never_writes_into_what_was_delivered(
    dataset: ShardIndex, samples: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, num_threads: int, size: int
) -> None:
    victim = 7
    hanging = Hanging(dataset, victim)
    monkeypatch.setattr(os, "preadv", hanging)
    reader = open_reader(dataset, size, num_threads=num_threads, depth=2, read_timeout_s=0.3, check_crc=False)
    kept: list[tuple[int, Tensor]] = []
    with reader:
        for unit in (reader.next() for _ in range(dataset.num_samples // size)):
            assert unit.latents is not None
            for row, number in enumerate(unit.request.samples.tolist()):
                if (error := unit.errors[row]) is not None:
                    assert number == victim or (num_threads == 1 and number // size == victim // size)
                    assert f"sample '{dataset.keys[number]}'" in str(error) and "longer than 0.3 s" in str(error)
                    assert not unit.latents[row].any() and not unit.prompt_embeds[row].any()
                else:
                    assert torch.equal(unit.latents[row], samples.latents_of(number))
                    kept.append((number, unit.latents[row]))
        assert victim not in dict(kept) and len(kept) >= dataset.num_samples - dataset.num_samples % size - size
        hanging.resume.set()
        assert hanging.returned.wait(10)
    for number, latents in kept:
        assert torch.equal(latents, samples.latents_of(number))


def test_close_leaves_a_hanging_read_behind(dataset: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_CLOSE_S", 0.2)
    hanging = Hanging(dataset, 0)
    monkeypatch.setattr(os, "preadv", hanging)
    reader = open_reader(dataset, read_timeout_s=0.1)
    assert "longer than 0.1 s" in str(reader.next().errors[0])
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < 3
    hanging.resume.set()


def test_a_process_ends_while_a_read_hangs(dataset: ShardIndex) -> None:
    """Reading a fifo that nobody writes to, as a dead file server would let it."""
    path = dataset.paths[0]
    path.unlink()
    os.mkfifo(path)
    script = f"""
import numpy as np
from pathlib import Path
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.format import read_json
from sgmd_dist.data.record import ShardRecord, sidecar_path
from sgmd_dist.data.reader import Reader, UnitRequest
path = Path({os.fspath(path)!r})
index = ShardIndex([(path, ShardRecord.from_json(read_json(sidecar_path(path), ""), path))])
reader = Reader(index, iter([UnitRequest(0, 0, 0, np.array([0]))]), micro_batch_size=1, text_tokens=5,
                read_timeout_s=0.2)
print(reader.next().errors[0])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "longer than 0.2 s" in done.stdout
