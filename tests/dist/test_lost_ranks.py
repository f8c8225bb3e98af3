"""A failure is told with the rank that it came from: one that hangs, dies, or fails by itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Ranks
from running import train_command

from sgmd_dist.parallel.lost_ranks import Note, Place, findings
from sgmd_dist.trainer import Trainer

NUM_BLOCKS = 1  # of the network: the run around it is what is tested
TIMEOUT_S = 6.0
LONG = ["run.steps=100000", f"health.timeout={TIMEOUT_S}", "data.read_timeout=5"]


def train_until(lines: int, recipe_path: Path, function: Callable[..., None] = train_command) -> tuple[Ranks, Path]:
    """Three ranks that train without end, once so many steps are logged; with their folder of logs."""
    ranks = Ranks(3, function, recipe_path, [*LONG, "data.global_batch_size=3"])
    metrics, end = recipe_path.parent / "run/metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < lines:
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.02)
    return ranks, metrics.parent / "logs"


def errors_in(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "| ERROR " in line]


def test_a_rank_that_hangs_is_named_within_the_timeout_with_what_the_others_wait_in(recipe_path: Path) -> None:
    ranks, logs = train_until(2, recipe_path)
    frozen = ranks.processes[1].pid
    os.kill(frozen, signal.SIGSTOP)
    begun = time.monotonic()
    try:
        for rank in (0, 2):
            ranks.processes[rank].join(4 * TIMEOUT_S)
            assert not ranks.processes[rank].is_alive()
        assert time.monotonic() - begun < 3 * TIMEOUT_S
    finally:
        ranks.kill()
    (line,) = errors_in(logs / "rank0.log")
    assert f"no word from rank 1 (node {os.uname().nodename}, process {frozen}): dead, or hanging" in line
    assert "the other ranks were at gloo:" in line
    assert not errors_in(logs / "rank2.log"), "one rank speaks for all"
    (folder,) = logs.glob("failure-*")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("rank00000.json", "rank00002.json", "trace00000.json", "trace00002.json")
    ]


def test_a_rank_that_dies_is_named(recipe_path: Path) -> None:
    ranks, logs = train_until(2, recipe_path)
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    ranks.exit_codes()
    (line,) = errors_in(logs / "rank1.log")
    assert "no word from rank 0 (node" in line


def train_with_a_fault_on_rank_2(recipe_path: Path, overrides: list[str]) -> None:
    def train_step(self: Trainer) -> None:
        if self.step == 3 and self.mesh.rank == 2:
            raise MemoryError("this one had too little")
        step(self)

    step, Trainer.train_step = Trainer.train_step, train_step
    train_command(recipe_path, overrides)


def test_a_rank_that_fails_by_itself_is_named_with_its_error(recipe_path: Path) -> None:
    ranks, logs = train_until(2, recipe_path, train_with_a_fault_on_rank_2)
    ranks.exit_codes()
    lines = [line for log in sorted(logs.glob("*.log")) for line in errors_in(log)]
    assert any("rank 2 (node" in line and "failed first: MemoryError this one had too little" in line for line in lines)


@pytest.mark.parametrize("collective", ["", "gloo:all_reduce, number 7 of default_pg"])
def test_all_missing_ranks_are_named(collective: str) -> None:
    places = [Place(rank, "n1", 100 + rank) for rank in range(4)]
    notes = {rank: Note(rank, "RuntimeError timed out", False, collective, 1.0 + rank) for rank in (0, 2)}
    text = findings(places, notes, Path("logs/failure"))
    assert text.startswith("no word from rank 1 (node n1, process 101), rank 3 (node n1, process 103)")
    assert (f"the other ranks were at {collective}" in text) == bool(collective)
