"""A real Slurm cluster of two nodes on this machine: its own key, ports and state, below one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
STARTS_WITHIN_S = 30.0


def why_not() -> str | None:
    """What this machine lacks for a cluster; None if it lacks nothing."""
    if os.geteuid() != 0:
        return "a Slurm cluster of one's own needs root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"no {', '.join(missing)} on this machine: apt-get install slurm-wlm munge"
    return None


def wait_until(condition: Callable[[], bool], what: str, within_s: float) -> None:
    """Look every tenth of a second.

    Raises:
        TimeoutError: `what` did not happen.
    """
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"within {within_s:g} s not seen: {what}")
        time.sleep(0.1)


class Cluster:
    """The daemons, from construction to `stop`."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            TimeoutError: the nodes did not come up; with the daemons' logs.
        """
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._write_configuration()
        try:
            self._start_daemons()
        except TimeoutError as error:
            self.stop()
            logs = [f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log"))]
            raise TimeoutError("\n".join([str(error), *logs])) from None

    def _write_configuration(self) -> None:
        folder, host = self._folder, socket.gethostname()
        ports = _free_ports(1 + len(NODES))
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthInfo": f"socket={folder}/munge.socket",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool-%n",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "MpiDefault": "none",
            "ReturnToService": 2,
            "KillWait": 5,
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,requeue_delay=0",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        for node, port in zip(NODES, ports[1:], strict=True):
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1")
        lines.append(f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP")
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def _start_daemons(self) -> None:
        folder = self._folder
        options = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "seed"}
        self._start(
            "munged", "--foreground", "--force", *(f"--{name}={folder}/{file}" for name, file in options.items())
        )
        wait_until((folder / "munge.socket").exists, "munged's socket", STARTS_WITHIN_S)
        self._start("slurmctld", "-D")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node, log=f"slurmd-{node}")
        wait_until(lambda: self._idle_nodes() == len(NODES), "idle nodes", STARTS_WITHIN_S)

    def _start(self, program: str, *arguments: str, log: str | None = None) -> None:
        with (self._folder / f"{log or program}.log").open("wb") as file:
            environment = {**os.environ, **self.environment}
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments], stdout=file, stderr=file, env=environment, start_new_session=True
                )
            )

    def _idle_nodes(self) -> int:
        found = self._try("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        return len(found.stdout.split()) if found.returncode == 0 else 0

    def _try(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def run(self, *command: str) -> str:
        """What one of Slurm's commands prints.

        Raises:
            AssertionError: it failed.
        """
        done = self._try(*command)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """Slurm's fields of a job, as JobState, ExitCode and Restarts."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """End all jobs and daemons."""
        if len(self._daemons) > 1:
            self._try("scancel", "--full", "--user=root")
            self._try("scontrol", "shutdown")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
