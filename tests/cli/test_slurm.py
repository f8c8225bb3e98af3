"""The batch scripts on a real Slurm cluster of two nodes: preempted, broken and refused jobs."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster as slurm
import pytest
from commands import REPO, run_forked

RECIPE = "recipes/tiny_sgmd.yaml"
# Long enough to be stopped on the way, however slow the machine; the last step decides on the comparison.
SHORTER = [
    "run.steps=12",
    "data.global_batch_size=2",
    "data.micro_batch_size=1",
    "run.log_every=1",
    "checkpoint.every=4",
    "logging.tensorboard=false",
]
ENDS_WITHIN_S = 180.0

pytestmark = pytest.mark.skipif(slurm.why_not() is not None, reason=slurm.why_not() or "")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    cluster = slurm.Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The state that two ranks without Slurm end in."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_forked(f"torchrun --nproc-per-node=2 launch/train.py {RECIPE} run.dir={run_dir} {' '.join(SHORTER)}")
    assert done.code == 0, done.output
    return final_state(run_dir)


def final_state(run_dir: Path) -> dict[str, int]:
    """Checksums of every bit of the last step's checkpoint."""
    return json.loads((run_dir / "checkpoints/step-00000012/meta.json").read_text())["checksums"]


class Job:
    """A submitted batch script, and what it printed."""

    def __init__(self, cluster: slurm.Cluster, folder: Path, script: str, *arguments: str) -> None:
        self._cluster, self.logs, self._output = cluster, folder / "logs", folder / "job.log"
        size = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60"]
        environment = f"--export=ALL,PYTHON={sys.executable},LOGS={self.logs}"
        output = f"--output={self._output}"
        script = f"launch/slurm/{script}"
        submitted = cluster.run(
            "sbatch", "--parsable", *size, environment, output, f"--chdir={REPO}", script, *arguments
        )
        self.id = submitted.strip()

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def prints(self, text: str) -> None:
        """Wait until the script has said it."""
        wait_until(self, lambda: text in self.output, text)

    def is_in(self, *states: str) -> dict[str, str]:
        """Wait until the job is in one of the states; Slurm's fields of it."""
        try:
            slurm.wait_until(lambda: self._cluster.state(self.id)["JobState"] in states, str(states), ENDS_WITHIN_S)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self._cluster.state(self.id)}\n{self.everything()}") from None
        return self._cluster.state(self.id)

    def ends(self) -> dict[str, str]:
        """Wait for the job's end; Slurm's fields of it."""
        return self.is_in("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def everything(self) -> str:
        """All that the script and the ranks printed."""
        return "\n".join([self.output, *(path.read_text() for path in sorted(self.logs.glob("*.log")))])


def wait_for_steps(run_dir: Path, count: int, job: Job) -> None:
    """Wait until so many steps are logged."""
    metrics = run_dir / "metrics.jsonl"
    wait_until(job, lambda: metrics.exists() and metrics.read_text().count("\n") >= count, f"{count} steps")


def wait_until(job: Job, condition: Callable[[], bool], what: str) -> None:
    try:
        slurm.wait_until(condition, what, ENDS_WITHIN_S)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{job.everything()}") from None


def test_a_job_that_is_preempted_and_then_loses_a_rank_ends_as_if_undisturbed(
    cluster: slurm.Cluster, tmp_path: Path, undisturbed: dict[str, int]
) -> None:
    """Preempted, it saves and returns to the queue; without a rank it fails, and the same command continues."""
    run_dir = tmp_path / "run"
    arguments = (RECIPE, f"run.dir={run_dir}", *SHORTER, "health.timeout=12", "data.read_timeout=10")
    job = Job(cluster, tmp_path, "train.sbatch", *arguments, "run.resume=never")
    wait_for_steps(run_dir, 2, job)
    cluster.run("scancel", "--signal=USR1", job.id)
    job.prints("stopped with everything saved; back into the queue")
    job.is_in("PENDING")
    (saved,) = checkpoints(run_dir)
    # By itself Slurm waits two minutes; a start in the second in which it took the job back would be refused.
    cluster.run("scontrol", "update", f"JobId={job.id}", "StartTime=now+3")

    wait_until(job, lambda: len(checkpoints(run_dir) - {saved}) > 0, "the next checkpoint")
    os.kill(process_of_rank(cluster, job, 1), signal.SIGKILL)
    ended = job.ends()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), job.everything()
    assert "start 2: 2 ranks on n[1-2]" in job.output
    assert f"resumed {saved}" in job.everything()
    assert "FAILED, exit code" in job.output
    assert "the same sbatch command continues" in job.output
    assert "no word from rank 1 (node" in job.output
    assert run_dir / "checkpoints/step-00000012" not in checkpoints(run_dir)

    newest = max(checkpoints(run_dir))
    again = Job(cluster, tmp_path, "train.sbatch", *arguments)
    ended = again.ends()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), again.everything()
    assert f"resumed {newest}" in again.everything()
    assert final_state(run_dir) == undisturbed


def checkpoints(run_dir: Path) -> set[Path]:
    return set((run_dir / "checkpoints").glob("step-????????"))


def process_of_rank(cluster: slurm.Cluster, job: Job, rank: int) -> int:
    """The process that the node's daemon started as this rank of the job."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and has(folder, f"SLURM_JOB_ID={job.id}", f"RANK={rank}"):
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}\n{job.everything()}")


def has(process: Path, *variables: str) -> bool:
    """Whether a process runs in an environment with all of these."""
    try:
        environment = process.joinpath("environ").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False
    return all(variable.encode() in environment for variable in variables)


def test_a_wrong_recipe_is_named_once_and_never_started_again(cluster: slurm.Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "train.sbatch", RECIPE, f"run.dir={tmp_path}/run", "optim.generator.lr=fast")
    ended = job.ends()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    (line,) = (line for line in job.output.splitlines() if line.startswith("error: "))
    assert "optim.generator.lr" in line
