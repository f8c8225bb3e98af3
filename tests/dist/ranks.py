"""Runs functions on gloo ranks, in processes forked for each call."""

from __future__ import annotations

import faulthandler
import io
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
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
        self.processes: list[ForkServerProcess] = []
        for launcher in launchers(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(sender, launcher, function, args), daemon=True)
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
                    results[rank] = _receive(receiver, rank, self.processes[rank])
        finally:
            self.kill()
        return [results[rank] for rank in sorted(results)]

    def kill(self) -> None:
        """SIGKILL every rank that still runs."""
        for process in self.processes:
            process.kill()
            process.join()

    def exit_codes(self, deadline_s: float = DEADLINE_S) -> list[int | None]:
        """Wait for the processes' own ends and return their exit codes."""
        for process in self.processes:
            process.join(deadline_s)
        return [process.exitcode for process in self.processes]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks; returns the results by rank."""
    return Ranks(world_size, function, *args).join()


def _main(sender: Connection, launcher: dict[str, str], function: Callable[..., Any], args: Any) -> None:
    keep_what_was_imported()
    faulthandler.enable()  # a rank that crashes says where
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


def _receive(receiver: Connection, rank: int, process: ForkServerProcess) -> Any:
    try:
        succeeded, value = receiver.recv()
    except EOFError:
        process.join(_ENDING_S)
        raise RankError(f"rank {rank} ended without a result, exit code {process.exitcode}") from None
    if not succeeded:
        raise RankError(f"rank {rank} failed:\n{value}")
    return torch.load(io.BytesIO(value), weights_only=False)
