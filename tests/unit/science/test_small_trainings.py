"""A training of a small world: what it counts, what it repeats, and the deliberate mistake."""

from __future__ import annotations

import math

import pytest
import torch

from sgmd_dist.benchmarks.science import trajectories
from sgmd_dist.benchmarks.science.methods import METHODS, SGMD
from sgmd_dist.benchmarks.science.training import Curve, Method, Point, Training
from sgmd_dist.objectives.base import StepState

WORLD = trajectories.build()


def training(method: Method, seed: int = 0) -> Training:
    return Training(WORLD, method, 1e-3, seed, 64, 64)


def point(passes: float, cpu_s: float, swd: float) -> Point:
    return Point(int(passes), passes, cpu_s, {"swd": swd})


CURVE = Curve("w", "m", 1e-3, 0, [point(0, 0, 0.5), point(10, 1, 0.2), point(20, 3, 0.1), point(30, 4, 0.3)])


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].leaks])
def test_every_method_spends_the_passes_that_it_plans(name: str) -> None:
    run = training(METHODS[name])
    planned = 0.0
    for phase in run.objective.phases(0):
        for each in phase.passes:
            planned += each.batch * each.mean * {"none": 1, "input": 2, "weights": 3}[each.gradient]
    curve = run.run(max_passes=20 * planned, num_points=1)
    assert not curve.diverged
    # The exits are drawn: their mean wanders by some passes.
    assert curve.points[-1].passes / curve.points[-1].steps == pytest.approx(planned, rel=0.25)
    assert len(curve.exits) == 4 and curve.exits[-1] == curve.points[-1].scores


def test_a_seed_gives_the_same_curve_and_another_one_another() -> None:
    first, again, other = (training(METHODS[SGMD], seed).run(60, 2) for seed in (0, 0, 1))
    assert [p.scores for p in first.points] == [p.scores for p in again.points]
    assert first.points[0].scores == other.points[0].scores, "all start from the teacher's weights"
    assert first.points[-1].scores != other.points[-1].scores
    assert first.metrics["generator/alpha"] > 0


def generator_phase(method: Method) -> Training:
    run = training(method)
    run._train_phase(run.objective.phases(0)[0], StepState(0, 0, num_units=1))
    return run


def test_the_leak_is_the_generator_phases_gradient_of_the_fake_score() -> None:
    clean, leaking = generator_phase(METHODS[SGMD]), generator_phase(METHODS["SGMD with FSDP2's leak"])
    assert all(p.grad is None for p in clean.roles["fake_score"].parameters.values())
    kept = [p.grad for p in leaking.roles["fake_score"].parameters.values() if p.grad is not None]
    assert kept and any(float(gradient.abs().max()) > 0 for gradient in kept)
    weights = [[*run.roles["generator"].parameters.values()] for run in (clean, leaking)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True)), "the generator's own update is the same"


def test_a_curve_is_read_inside_a_budget() -> None:
    assert CURVE.best().passes == 20
    assert CURVE.best(passes=15).passes == 10 and CURVE.best(cpu_s=0.5).passes == 0
    reached = CURVE.first_below(0.2)
    assert reached is not None and reached.passes == 10
    assert CURVE.first_below(0.05) is None


def test_a_training_whose_scores_are_not_finite_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    run = training(METHODS[SGMD])
    monkeypatch.setattr(run.world, "score", lambda samples, reference: {"swd": math.nan})
    curve = run.run(60, 3)
    assert curve.diverged and len(curve.points) == 2 and not curve.exits
