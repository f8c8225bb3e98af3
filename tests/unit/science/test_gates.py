"""The gates of a smoke run, and the run itself."""

from __future__ import annotations

import pytest
from commands import run_forked

from sgmd_dist.benchmarks.science.gates import Verdict, judge_acceptance, judge_smoke
from sgmd_dist.benchmarks.science.methods import DMD2, SGMD
from sgmd_dist.benchmarks.science.training import Curve, Point


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


def training(*quality: float, cost: float = 100.0, **scores: float) -> Curve:
    """Scored after each `cost` passes; the other scores are the same all the time."""
    others = {"motion_ratio": 1.0, "jitter_ratio": 1.28, "shape_error": 0.08} | scores
    points = [Point(i, cost * i, cost * i / 30, {"swd": swd} | others) for i, swd in enumerate(quality)]
    return Curve("tiny_wan", "m", 3e-5, 0, points)


FINE, SLOW = training(0.2, 0.08), training(0.2, 0.15, 0.095, motion_ratio=0.9)


def pair(sgmd: list[Curve], dmd2: list[Curve]) -> dict[str, list[Curve]]:
    return {SGMD: sgmd, DMD2: dmd2}


def failed(verdict: Verdict) -> set[int]:
    return {place for place, gate in enumerate(verdict.gates) if not gate.passed}


def test_acceptance_is_of_cost() -> None:
    good = pair([FINE, FINE], [SLOW, SLOW])
    assert judge_acceptance(good, good).passed
    slower = training(0.2, 0.15, 0.13, 0.095)
    assert failed(judge_acceptance(pair([FINE, slower], [SLOW, SLOW]), good)) == {0, 1, 2}, "one seed takes longer"
    assert failed(judge_acceptance(pair([FINE, training(0.2, 0.15)], [SLOW, SLOW]), good)) == {0, 1, 2}, "never there"


@pytest.mark.parametrize(
    "ours, places",
    [
        (training(0.2, 0.15), {3, 4}),
        (training(0.2, 0.08, motion_ratio=1.3), {5, 6}),
        (training(0.2, 0.08, jitter_ratio=1.9), {7}),
        (training(0.2, 0.08, shape_error=0.12), {8}),
    ],
)
def test_acceptance_is_of_quality(ours: Curve, places: set[int]) -> None:
    soon = pair([FINE, FINE], [SLOW, SLOW])
    assert failed(judge_acceptance(soon, pair([FINE, ours], [SLOW, SLOW]))) == places


def test_a_dmd2_that_never_gets_there_counts_with_its_whole_training() -> None:
    never = training(0.2, 0.18, 0.15, motion_ratio=0.9)
    verdict = judge_acceptance(pair([FINE], [never]), pair([FINE], [SLOW]))
    assert verdict.gates[0].value == pytest.approx(0.5)


def test_the_smoke_run_keeps_its_gates() -> None:
    done = run_forked("python launch/bench.py science --smoke")
    assert done.code == 0, done.output
    assert done.output.count("ok ") == 3
