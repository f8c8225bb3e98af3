"""What people see of a run, and what they ask of it while it runs, changes nothing of the training."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ranks import run_ranks
from running import State, max_difference, train

from sgmd_dist import checkpoint
from sgmd_dist.errors import UserError
from sgmd_dist.trainer import Trainer

NUM_BLOCKS = 1  # of the network: the run around it is what is tested
TOKENS = 3 * 4 * 4  # of latents [3, 3, 8, 8] in patches of 1 x 2 x 2


class Signalled(Trainer):
    """The last rank gets SIGUSR2 twice before training, and once more while step 2 is recorded."""

    def resume(self) -> None:
        self.interrupt()
        self.interrupt()
        super().resume()

    def train_step(self) -> None:
        if self.step == 1:
            self.interrupt()
        super().train_step()

    def interrupt(self) -> None:
        if self.mesh.rank == self.mesh.layout.world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)


def lines(recipe_path: Path) -> list[dict[str, Any]]:
    return [*map(json.loads, (recipe_path.parent / "run/metrics.jsonl").read_text().splitlines())]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, write_recipe) -> tuple[Path, State]:
    """A recipe, and the state after two ranks trained it undisturbed."""
    recipe_path = write_recipe(tmp_path_factory.mktemp("quiet"))
    return recipe_path, run_ranks(2, train, recipe_path)[0]


def test_a_signal_and_the_recipe_record_steps_of_one_rank_and_change_no_bit(
    recipe_path: Path, quiet: tuple[Path, State]
) -> None:
    state = run_ranks(2, train, recipe_path, ["logging.profile={steps: [4, 4], ranks: [0]}"], Signalled)[0]
    assert set(max_difference(state, quiet[1]).values()) == {0.0}
    folder = recipe_path.parent / "run/profile"
    by_recipe, by_signal = (f"step-{first:08d}-rank{rank:05d}.trace.json.gz" for first, rank in ((4, 0), (1, 1)))
    assert sorted(os.listdir(folder)) == [by_signal, by_recipe], "signals before and while a recording count as one"
    for name, num_steps in ((by_signal, 2), (by_recipe, 1)):
        events = [event["name"] for event in json.loads(gzip.decompress((folder / name).read_bytes()))["traceEvents"]]
        ranges = ("time/step_s", "time/generator_s", "time/fake_score_s")
        assert [events.count(part) for part in ranges] == [num_steps] * 3
        assert {"aten::addmm", "aten::_fused_adamw_"} < set(events)
        assert any("all_gather" in event for event in events)


def train_refused_by_wandb(recipe_path: Path) -> str:
    def refuse(**arguments: Any) -> None:
        raise RuntimeError("no login")

    module = ModuleType("wandb")
    vars(module).update(Error=RuntimeError, Settings=dict, init=refuse)
    sys.modules["wandb"] = module
    with pytest.raises(UserError) as refused:
        train(recipe_path, ["logging.wandb={mode: online}"])
    return str(refused.value)


def test_no_rank_trains_a_run_that_wandb_refuses(recipe_path: Path) -> None:
    first, second = run_ranks(2, train_refused_by_wandb, recipe_path)
    assert first == second and "logging.wandb: RuntimeError no login" in first


def test_rates_follow_from_the_seconds_of_a_step(quiet: tuple[Path, State]) -> None:
    for line in lines(quiet[0]):
        assert line["perf/samples_per_s"] == pytest.approx(2 / line["time/step_s"])
        assert line["perf/tokens_per_s"] == pytest.approx(TOKENS * line["perf/samples_per_s"])
        assert 2**27 < line["perf/peak_bytes"] < 2**35
        assert not {"perf/tflops_per_gpu", "perf/mfu", "perf/flops_per_step"} & line.keys()


def test_an_alarm_that_stops_saves_and_ends_the_training_on_all_ranks(recipe_path: Path) -> None:
    always = "health.alarms={gap: 1.000001, window: 1, warmup: 0, patience: 1, residual: null, grad_norm: null, stop: true}"
    run_ranks(2, train, recipe_path, ["run.steps=50", always])
    found = [line["health/alarm/gap"] for line in lines(recipe_path)]
    first = found.index(1.0)
    assert len(found) == first + 2 < 50, "told to all ranks at the end of the next step"
    run_dir = recipe_path.parent / "run"
    assert [path.name for path in checkpoint.committed(run_dir)] == [f"step-{len(found):08d}"]
