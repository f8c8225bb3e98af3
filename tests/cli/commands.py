"""Runs commands in the repository's root: as a user types them, or forked where everything has been imported."""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from forking import context, keep_what_was_imported

REPO = Path(__file__).parents[2]
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


def run_forked(command: str) -> Done:
    """`run` for `python launch/NAME.py ...` without the seconds in which Python imports torch, transformers and so on.

    Raises:
        TimeoutError: it did not end within `TIMEOUT_S`; it was killed.
    """
    python, *arguments = shlex.split(command)
    assert python == "python" and arguments[0].startswith("launch/"), f"to be run by run(): {command}"
    with tempfile.NamedTemporaryFile(mode="r") as output:
        process = context.Process(target=_launch, args=(output.name, arguments))
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{command}: no end within {TIMEOUT_S} s\n{output.read()}")
        return Done(process.exitcode, output.read())


def _launch(output: str, arguments: list[str]) -> None:
    keep_what_was_imported()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in (*OF_THE_TEST_RUN, *LAUNCHER_VARIABLES):
        os.environ.pop(name, None)
    os.chdir(REPO)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
