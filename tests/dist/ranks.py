"""Runs functions on gloo ranks, in processes forked for each call."""

from __future__ import annotations

import faulthandler
import io
import os
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from forking import context, keep_what_was_imported, launchers

DEADLINE_S = 240.0
_ENDING_S = 5.0  # that a process whose pipe is closed has for its end


class RankError(AssertionError):
    """A rank failed; the message begins with the trace of the rank that failed first."""


class Ranks:
    """`world_size` running processes that each call `function(*args)` with a launcher's environment."""

    def __init__(self, world_size: int, function: Callable[..., Any], *args: Any) -> None:
        self._receivers: list[Connection] = []
        self._crashes = tempfile.TemporaryDirectory(prefix="ranks-")
        self.processes: list[ForkServerProcess] = []
        for launcher in launchers(world_size):
            receiver, sender = context.Pipe(duplex=False)
            crash = self._crash_of(len(self.processes))
            process = context.Process(target=_main, args=(sender, crash, launcher, function, args), daemon=True)
            process.start()
            sender.close()
            self._receivers.append(receiver)
            self.processes.append(process)

    def join(self, deadline_s: float = DEADLINE_S) -> list[Any]:
        """What the ranks returned, by rank. Kills every rank when one fails or hangs, and raises RankError."""
        results: dict[int, Any] = {}
        waiting = dict(zip(self._receivers, range(len(self._receivers)), strict=True))
        end = time.monotonic() + deadline_s
        try:
            while waiting:
                ready = wait(list(waiting), timeout=max(end - time.monotonic(), 0))
                if not ready:
                    raise RankError(f"ranks {sorted(waiting.values())} did not finish within {deadline_s} s")
                for receiver in ready:
                    rank = waiting.pop(receiver)
                    results[rank] = self._receive(receiver, rank)
        finally:
            self.kill()
        return [results[rank] for rank in sorted(results)]

    def kill(self) -> None:
        """SIGKILL every rank that still runs."""
        for process in self.processes:
            process.kill()
            process.join()
        self._crashes.cleanup()

    def exit_codes(self, deadline_s: float = DEADLINE_S) -> list[int | None]:
        """Wait for the processes' own ends and return their exit codes."""
        for process in self.processes:
            process.join(deadline_s)
        return [process.exitcode for process in self.processes]

    def _crash_of(self, rank: int) -> Path:
        """The file that tells where a rank was when a signal ended it."""
        return Path(self._crashes.name) / str(rank)

    def _receive(self, receiver: Connection, rank: int) -> Any:
        try:
            succeeded, value = receiver.recv()
        except EOFError:
            process = self.processes[rank]
            process.join(_ENDING_S)
            crash = path.read_text(errors="replace") if (path := self._crash_of(rank)).exists() else ""
            ended = f"rank {rank} ended without a result, exit code {process.exitcode}; {_place(crash)}"
            warnings.warn(ended, stacklevel=2)  # also where the test runs again and passes
            raise RankError(f"{ended}\n{crash}") from None
        if not succeeded:
            raise RankError(f"rank {rank} failed:\n{value}")
        return torch.load(io.BytesIO(value), weights_only=False)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks; returns the results by rank."""
    return Ranks(world_size, function, *args).join()


def _main(sender: Connection, crash: Path, launcher: dict[str, str], function: Callable[..., Any], args: Any) -> None:
    keep_what_was_imported()
    faulthandler.enable(crash.open("w"))
    torch.set_num_threads(1)
    os.environ.update(launcher)
    try:
        buffer = io.BytesIO()
        torch.save(function(*args), buffer)  # plain pickling would share memory that dies with this process
        sender.send((True, buffer.getvalue()))
    except SystemExit as end:
        raise end
    except BaseException:
        sender.send((False, traceback.format_exc()))
    sender.close()


def _place(crash: str) -> str:
    """The frames of the thread that crashed in one line, innermost first, of what faulthandler wrote."""
    frames = crash.partition("Current thread ")[2].partition("\n\n")[0].splitlines()[1:]
    return " < ".join(re.sub(r'File ".*?([^/"]*)", line (\d+) in ', r"\1:\2 ", frame.strip()) for frame in frames)
