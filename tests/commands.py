"""Runs commands in the repository's root: as a user types them, or forked where everything has been imported."""

from __future__ import annotations

import io
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from forking import context, keep_what_was_imported, launchers

REPO = Path(__file__).parents[1]
TIMEOUT_S = 300
OF_THE_TEST_RUN = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTEST_ADDOPTS")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Done:
    """A finished command. `output` holds stdout and stderr as they came."""

    code: int
    output: str

    def errors(self) -> list[str]:
        """The lines of output that report an error."""
        return [line for line in self.output.splitlines() if line.startswith("error: ") or "Traceback" in line]


def run(command: str) -> Done:
    """Run one command line without a shell, the environment's programs first in PATH; `#` begins a comment."""
    environment = {key: value for key, value in os.environ.items() if key not in OF_THE_TEST_RUN}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["OMP_NUM_THREADS"] = "1"
    finished = subprocess.run(
        shlex.split(command, comments=True),
        cwd=REPO,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return Done(finished.returncode, finished.stdout)


def run_forked(command: str, kill_when: Callable[[], bool] | None = None) -> Done:
    """`run` for `python launch/NAME.py ...` and `torchrun --nproc-per-node=N launch/NAME.py ...` without the seconds in
    which each process imports torch, transformers and so on.

    Args:
        kill_when: looked at all the time; where it becomes true, all processes get SIGKILL.

    Raises:
        TimeoutError: it did not end within `TIMEOUT_S`; it was killed.
    """
    program, *arguments = shlex.split(command)
    nothing: dict[str, str] = {}
    ranks = int(arguments.pop(0).removeprefix("--nproc-per-node=")) if program == "torchrun" else 0
    assert program in ("python", "torchrun") and arguments[0].startswith("launch/"), f"to be run by run(): {command}"
    with tempfile.NamedTemporaryFile(mode="r") as output:
        processes = [
            context.Process(target=_launch, args=(output.name, arguments, launcher))
            for launcher in launchers(ranks) or [nothing]
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + TIMEOUT_S
        if kill_when is not None:
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                if kill_when():
                    for process in processes:
                        process.kill()
                time.sleep(0.005)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if any(process.exitcode is None for process in processes):
            for process in processes:
                process.kill()
                process.join()
            raise TimeoutError(f"{command}: no end within {TIMEOUT_S} s\n{output.read()}")
        return Done(max((process.exitcode or 0 for process in processes), key=abs), output.read())


def run_in_turn(commands: list[str]) -> list[Done]:
    """`run_forked` for hundreds of `python launch/NAME.py ...`: all in one process, one after the other.

    Raises:
        TimeoutError: not all ended within `TIMEOUT_S`; names the one that did not.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_launch_in_turn, args=(sender, commands))
    process.start()
    sender.close()
    done: list[Done] = []
    deadline = time.monotonic() + TIMEOUT_S
    while len(done) < len(commands):
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            process.kill()
            raise TimeoutError(f"{commands[len(done)]}: no end within {TIMEOUT_S} s of the first command's start")
        done.append(Done(*receiver.recv()))
    process.join()
    return done


def _launch_in_turn(sender: Connection, commands: list[str]) -> None:
    keep_what_was_imported()
    _enter({})
    for command in commands:
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            code = _exit_code_of(shlex.split(command)[1:])
        sender.send((code, output.getvalue()))


def _exit_code_of(arguments: list[str]) -> int:
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _launch(output: str, arguments: list[str], launcher: dict[str, str]) -> None:
    keep_what_was_imported()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    _enter(launcher)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _enter(launcher: dict[str, str]) -> None:
    """The working folder and the environment of a command."""
    for name in (*OF_THE_TEST_RUN, *LAUNCHER_VARIABLES):
        os.environ.pop(name, None)
    os.environ.update(launcher)
    os.chdir(REPO)
