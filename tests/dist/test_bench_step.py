"""`launch/bench.py step`: it counts what a step runs, its parts add up, and it leaves training as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from running import State, gathered, max_difference

from sgmd_dist.benchmarks.step import WARM_UP_STEPS, MeasuredTrainer, StepReport
from sgmd_dist.objectives._distillation import Distillation
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.trainer import Trainer

EXIT = 1
STEPS = 2
OVERRIDES = [
    "data.global_batch_size=4",
    "parallel.activation_checkpointing=block",
    "objective.inner_sample=reuse",
]


def measure(recipe_path: Path) -> tuple[StepReport, State]:
    Distillation.exit_index = lambda *args, **kwargs: EXIT
    recipe = load_recipe(recipe_path, OVERRIDES)
    with process_group() as device:
        trainer = MeasuredTrainer(recipe, build_mesh(recipe.layout(world_size()), device))
        report, state = trainer.measure(STEPS), gathered(trainer)
        trainer.close()
        del trainer
    return report, state


def train_unmeasured(recipe_path: Path) -> State:
    Distillation.exit_index = lambda *args, **kwargs: EXIT
    recipe = load_recipe(recipe_path, OVERRIDES)
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        for _ in range(WARM_UP_STEPS + STEPS):
            trainer.train_step()
        state = gathered(trainer)
        trainer.close()
        del trainer
    return state


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[StepReport, State]]:
    return {}


def on_two_ranks(recipe_path: Path, measured: dict[str, tuple[StepReport, State]]) -> tuple[StepReport, State]:
    """Measured once for all tests."""
    if "run" not in measured:
        measured["run"] = run_ranks(2, measure, recipe_path)[0]
    return measured["run"]


def test_passes_are_counted_by_kind(recipe_path: Path, measured: dict) -> None:
    """2 micro-batches of one sample on each of 2 ranks; each kind once, the guided teacher on two samples."""
    report, _ = on_two_ranks(recipe_path, measured)
    assert {(p.role, p.kind): (p.calls_per_step, p.shape[0]) for p in report.passes} == {
        ("generator", "forward"): (2, 1),
        ("generator", "with weight gradients"): (2, 1),
        ("fake_score", "with input gradients"): (2, 1),
        ("teacher", "forward"): (2, 2),
        ("fake_score", "with weight gradients"): (2, 1),
    }
    assert report.sample_passes == EXIT + 13


def test_the_parts_of_a_step_add_up(recipe_path: Path, measured: dict) -> None:
    report, _ = on_two_ranks(recipe_path, measured)
    assert report.passes_s == pytest.approx(sum(p.calls_per_step * p.seconds for p in report.passes))
    assert report.passes_s + report.update_s + report.batches_s + report.rest_s == pytest.approx(report.step_s)
    assert list(report.phases_s) == ["generator", "fake_score"]
    assert 0.9 * report.step_s < sum(report.phases_s.values()) <= report.step_s
    assert min(report.update_s, report.batches_s, report.tokens_per_s, report.peak_bytes) > 0


def test_flops_are_those_of_the_passes(recipe_path: Path, measured: dict) -> None:
    """A linear layer on one token takes 2 operations a weight, and each kind of backward as many again."""
    report, _ = on_two_ranks(recipe_path, measured)
    width, text, ffn, layers = 24, 32, 40, 2
    latents = report.passes[0].shape[1:]
    tokens, patch = latents[1] * latents[2] * latents[3] // 4, 4 * latents[0]
    linear = layers * (6 * width**2 + 2 * width * ffn) * tokens + 2 * patch * width * tokens
    context = layers * 2 * width**2 * 8 + (text * width + width**2) * 8
    attention = layers * 2 * tokens * (tokens + 8) * width
    forward = 2 * (linear + context + attention)
    passes = 2 * (1 + 2 + 2 + 3 + 3)  # recomputation is no work of the model
    assert report.model_tflops * report.step_s * 1e12 == pytest.approx(passes * forward, rel=0.02)


def test_measuring_leaves_training_as_it_is(recipe_path: Path, measured: dict) -> None:
    _, state = on_two_ranks(recipe_path, measured)
    expected = run_ranks(2, train_unmeasured, recipe_path)[0]
    assert max(max_difference(state, expected).values()) == 0


def test_the_report_is_a_table_and_json(recipe_path: Path, measured: dict, tmp_path: Path) -> None:
    report, _ = on_two_ranks(recipe_path, measured)
    report.write(tmp_path / "step.json")
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["over_passes"] == report.step_s / report.passes_s
    assert written["over_passes_and_updates"] == report.step_s / (report.passes_s + report.update_s)
    assert written["planned_bytes"] > 0 and written["mfu"] is None
    table = report.table()
    assert f"step over passes {report.over_passes:.3f} (budget 1.05)" in table
    assert "pass teacher, forward, 2x" in table and "phase fake_score" in table
