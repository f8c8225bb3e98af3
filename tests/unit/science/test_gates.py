"""The gates of a smoke run, and the run itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sgmd_dist.benchmarks.science.gates import judge_smoke
from sgmd_dist.benchmarks.science.training import Curve, Point

REPO = Path(__file__).parents[3]


def curves(*best: float, speed: float = 1.0) -> list[Curve]:
    return [
        Curve("w", "m", 1e-3, seed, [Point(1, 1, 1, {"swd": swd, "speed_ratio": speed})])
        for seed, swd in enumerate(best)
    ]


def test_a_method_passes_by_its_mean_by_its_worst_seed_and_by_its_motion() -> None:
    assert judge_smoke(curves(0.1, 0.12), curves(0.2, 0.24)).passed
    failed = [
        judge_smoke(curves(0.17, 0.17), curves(0.2, 0.2)),
        judge_smoke(curves(0.05, 0.19), curves(0.2, 0.2)),
        judge_smoke(curves(0.1, 0.1, speed=0.8), curves(0.2, 0.2)),
    ]
    assert [[gate.passed for gate in verdict.gates] for verdict in failed] == [
        [False, True, True],
        [True, False, True],
        [True, True, False],
    ]
    assert "FAILED best swd, mean" in failed[0].table()


def test_the_smoke_run_keeps_its_gates() -> None:
    command = [sys.executable, "launch/bench.py", "science", "--smoke"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 3
