"""Which rank a failure came from: of 64 ranks that report a broken collective, 63 tell nothing of the cause.

    run.dir/logs/failure-<start of the run>/rank00003.json   what rank 3 was at when it, or another rank, failed
    run.dir/logs/failure-<start of the run>/trace00003.json  its last collectives, by torch's flight recorder

A rank that cannot go on leaves a note. The others look for notes in a thread of their own, also while they wait in a
collective, and leave theirs. A rank that has left none after a while has died or hangs.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from loguru import logger
from torch._C import _distributed_c10d

from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError, describe

RECORDED_COLLECTIVES = 2000
_RECORDER: Any = _distributed_c10d  # its dumps are private, and missing in torch's stubs
_PATIENCE_S = 30.0  # for the notes of the others; several looks of theirs, and what a shared disk takes to show a file


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    rank: int
    node: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.rank} (node {self.node}, process {self.process})"


@dataclass(frozen=True)
class Note:
    """What a rank left.

    Attributes:
        error: why it cannot go on; None if it only waited when another failed.
        is_told: the error is a `UserError`, which tells people enough.
        collective: the last one that it began, as "gloo:all_reduce, number 12 of default_pg"; "" before the first.
        at: seconds since 1970, by the node's clock.
    """

    rank: int
    error: str | None
    is_told: bool
    collective: str
    at: float


def record_collectives(run_dir: Path) -> None:
    """Let torch keep the last collectives of this process. Call it before the process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_COLLECTIVES))
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run_dir.resolve() / "logs" / "nccl_trace_rank_"))


@contextmanager
def naming_lost_ranks(run_dir: Path, timeout_s: float) -> Iterator[None]:
    """Within the context, log with a failure on any rank which ranks died, hang or failed first. Collective.

    Args:
        timeout_s: of collectives; a fraction of it is waited for the ranks' notes.
    """
    here = Place(dist.get_rank(), socket.gethostname(), os.getpid())
    places: list[Place] = [here] * dist.get_world_size()
    dist.all_gather_object(places, here)
    started = [time.strftime("%Y%m%d-%H%M%S")]
    dist.broadcast_object_list(started)
    notes = _Notes(run_dir / "logs" / f"failure-{started[0]}", here.rank, min(timeout_s / 4, _PATIENCE_S))
    notes.look_out()
    try:
        yield
    except Exception as error:
        notes.leave(error)
        if not isinstance(error, UserError):
            found = notes.wait_for(len(places))
            is_speaker = here.rank == min(rank for rank, note in found.items() if not note.is_told)
            logger.log("ERROR" if is_speaker else "DEBUG", "{}", findings(places, found, notes.folder))
        raise
    finally:
        notes.stop()


def findings(places: list[Place], notes: dict[int, Note], folder: Path) -> str:
    """What the notes of the ranks that still could leave one tell of a failure.

    Args:
        notes: by rank.
    """
    if missing := [place for place in places if place.rank not in notes]:
        last = max(notes.values(), key=lambda note: note.at)
        who = ", ".join(map(str, missing))
        cause = f"no word from {who}: dead, or hanging"
        if last.collective:
            cause += f"; the other ranks were at {last.collective}"
    else:
        first = min((note for note in notes.values() if note.error is not None), key=lambda note: note.at)
        cause = f"{places[first.rank]} failed first: {first.error}"
    return f"{cause}. What each rank was at, and its last collectives: {folder}"


class _Notes:
    """The notes of a run's ranks, with a thread that leaves this rank's as soon as another has left one."""

    def __init__(self, folder: Path, rank: int, patience_s: float) -> None:
        self.folder, self._rank, self._patience_s = folder, rank, patience_s
        self._own = folder / f"rank{rank:05d}.json"
        self._stopped = threading.Event()
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._look, name="lost_ranks", daemon=True)

    def look_out(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def leave(self, error: Exception | None) -> None:
        """Write this rank's note, unless there is one with as much in it."""
        with self._leaving:
            if self._own.exists() and error is None:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"trace{self._rank:05d}.json").write_bytes(_RECORDER._dump_fr_trace_json())
            is_told = isinstance(error, UserError)
            text = f"{type(error).__name__}: {error}" if is_told else error and describe(error)
            note = Note(self._rank, text, is_told, _last_collective(), time.time())
            write_durably(self._own, (json.dumps(asdict(note)) + "\n").encode())

    def wait_for(self, count: int) -> dict[int, Note]:
        """The ranks' notes, of all `count` of them or of those that leave one in time."""
        end = time.monotonic() + self._patience_s
        while len(notes := self._read()) < count and time.monotonic() < end:
            time.sleep(self._patience_s / 20)
        return notes

    def _read(self) -> dict[int, Note]:
        contents = [json.loads(path.read_bytes()) for path in self.folder.glob("rank*.json")]
        return {content["rank"]: Note(**content) for content in contents}

    def _look(self) -> None:
        while not self._stopped.wait(self._patience_s / 10):
            if self.folder.exists() and any(self.folder.glob("rank*.json")):
                self.leave(None)
                return


def _last_collective() -> str:
    entries = json.loads(_RECORDER._dump_fr_trace_json()).get("entries", [])
    if not entries:
        return ""
    last = entries[-1]
    return f"{last['profiling_name']}, number {last['collective_seq_id']} of {last['process_group'][1]}"
