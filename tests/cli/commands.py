"""Runs commands as a user types them: in the repository's root, with the environment's programs first in PATH."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
OF_THE_TEST_RUN = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTEST_ADDOPTS")


@dataclass(frozen=True)
class Done:
    """A finished command. `output` holds stdout and stderr as they came."""

    code: int
    output: str

    def errors(self) -> list[str]:
        """The lines of output that report an error."""
        return [line for line in self.output.splitlines() if line.startswith("error: ") or "Traceback" in line]


def run(command: str) -> Done:
    """Run one command line without a shell; `#` begins a comment."""
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
        timeout=300,
        check=False,
    )
    return Done(finished.returncode, finished.stdout)
