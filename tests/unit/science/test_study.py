"""Which trainings a study runs, what it keeps, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from commands import run_forked

from sgmd_dist.benchmarks.science import study
from sgmd_dist.benchmarks.science.methods import DMD2, METHODS, SGMD
from sgmd_dist.benchmarks.science.study import Budget, Job, Study, run_jobs
from sgmd_dist.benchmarks.science.training import Curve, Point
from sgmd_dist.errors import UserError

TINY = Budget(12, 1, 32, 32)


def test_a_job_that_has_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("trajectories", METHODS[SGMD], 1e-3, 0, TINY)
    (curve,) = run_jobs([job], 1, tmp_path)
    monkeypatch.setattr(study, "ProcessPoolExecutor", None)  # would be called
    kept = study._kept(job, tmp_path)
    assert kept == curve and len(curve.points) == 2
    assert study._kept(replace(job, seed=1), tmp_path) is None


def test_each_method_takes_its_best_learning_rate_by_seeds_that_give_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Job] = []

    def pretend(jobs: list[Job], workers: int, folder: Path | None) -> list[Curve]:
        seen.extend(jobs)
        best = {SGMD: 1e-3, DMD2: 3e-3}
        return [
            Curve(
                "w", job.method.name, job.lr, job.seed, [Point(1, 1, 1, {"swd": abs(job.lr - best[job.method.name])})]
            )
            for job in jobs
        ]

    monkeypatch.setattr(study, "run_jobs", pretend)
    curves = Study("trajectories", (SGMD, DMD2), (1e-3, 3e-3), 3, 2, TINY).run(2, None)
    assert {name: [curve.lr for curve in found] for name, found in curves.items()} == {
        SGMD: [1e-3] * 3,
        DMD2: [3e-3] * 3,
    }
    tuning, results = seen[:8], seen[8:]
    assert {job.seed for job in tuning} == {1000, 1001} and [job.seed for job in results] == [0, 1, 2] * 2


def test_a_training_is_good_at_any_time_if_it_is_good_soon() -> None:
    def training(*quality: float) -> Curve:
        return Curve("w", "m", 1e-3, 0, [Point(i, 10.0 * i, i, {"swd": swd}) for i, swd in enumerate(quality)])

    assert training(0.4, 0.2, 0.3, 0.1).anytime() == pytest.approx((0.4 + 0.2 + 0.2 + 0.1) / 4)
    assert training(0.4, 0.1, 0.5, 0.5).anytime() < training(0.4, 0.3, 0.2, 0.1).anytime()


def test_a_wrong_name_is_named() -> None:
    with pytest.raises(UserError, match=r"--methods 'SGDM': no such name; allowed: SGMD, .*did you mean 'SGMD'"):
        study.full_study("ring", 4, ["SGDM"])


def test_the_quick_benchmark_runs_every_method_in_every_world(tmp_path: Path) -> None:
    done = run_forked(f"python launch/bench.py science --quick --seeds 1 --out {tmp_path}")
    assert done.code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} >= {"results.json", "tables.md", "ring.png", "tiny_wan.png"}
    rows = [line for line in done.output.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 2 * (2 * (len(METHODS) + 1) + 3), "two tables: two worlds of all methods, one of two, and heads"
    assert "diverged" not in done.output


def test_a_longer_training_is_scored_at_the_same_distances() -> None:
    own, longer = (study.full_study("tiny_wan", 4, ["SGMD"], passes).budget for passes in (None, 4000))
    assert (own.passes, longer.passes) == (2000, 4000)
    assert longer.passes / longer.num_points == own.passes / own.num_points
