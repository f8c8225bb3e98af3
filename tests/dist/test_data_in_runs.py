"""Samples that cannot be read, on some ranks or all: counted together, bounded together, never averaged, never hung on;
and a run that goes on with another micro-batch in the middle of an epoch."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from commands import run_forked
from damaging import flip_last_bytes
from ranks import RankError, run_ranks
from running import parameter_difference, train

from sgmd_dist import checkpoint
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.recipe import Recipe
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.trainer import Trainer

NUM_BLOCKS = 1  # of the network: the run around it is what is tested
SMALL = ["data.global_batch_size=4", "data.micro_batch_size=2", "run.steps=3", "objective.inner_sample=reuse"]


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> str:
    """The override that names the world's shards with every fifth sample damaged."""
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    index = ShardIndex.open(folder)
    for sample in range(0, index.num_samples, 5):
        flip_last_bytes(index, sample)
    return f"data.shards={folder}"


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time", "perf/")) and not k.endswith("_s")} for line in lines]


@pytest.mark.parametrize("ranks, parallel", [(2, []), (2, ["parallel.ring=2"])])
def test_ranks_that_skip_train_log_and_count_as_one_process(
    recipe_path: Path, damaged: str, ranks: int, parallel: list[str]
) -> None:
    skip = [*SMALL, damaged, "data.on_error=skip", "data.max_skips=50"]
    one, many = recipe_path.parent / "one", recipe_path.parent / "many"
    first = run_ranks(1, train, recipe_path, [*skip, f"run.dir={one}"])[0]
    second = run_ranks(ranks, train, recipe_path, [*skip, *parallel, f"run.dir={many}"])[0]
    assert parameter_difference(first, second) < 1e-6
    logged = metrics_of(one)
    assert 0 < logged[-1]["data/skipped"] <= 12 and logged[-1]["data/epoch"] == 0 and logged[-1]["data/retries"] == 0
    assert metrics_of(many) == [pytest.approx(line, rel=1e-4) for line in logged]
    states = [checkpoint.read_meta(checkpoint.committed(folder)[-1]).stream for folder in (one, many)]
    assert states[0] == states[1] and states[0]["skipped"] == logged[-1]["data/skipped"]


def test_ranks_stop_together_when_they_have_skipped_too_much_together(recipe_path: Path, damaged: str) -> None:
    """Neither rank skips 3 by itself before both together do."""
    skip = [*SMALL, damaged, "data.on_error=skip", "data.max_skips=2", "run.steps=20"]
    results = run_ranks(2, stop_of, recipe_path, skip)
    assert results[0] == results[1]
    assert "data.max_skips: 2: " in results[0] and "sample '" in results[0] and " at offset " in results[0]


def stop_of(recipe_path: Path, overrides: list[str]) -> str:
    """How training ends."""
    try:
        train(recipe_path, overrides)
    except ValueError as error:
        return str(error)
    return "trained"


def test_one_rank_that_cannot_read_ends_all_soon_and_the_other_knows_why(recipe_path: Path, shards: Path) -> None:
    folder = recipe_path.parent / "shards"
    shutil.copytree(shards, folder)
    index = ShardIndex.open(folder)
    flip_last_bytes(index, 0)
    begun = time.monotonic()
    done = run_forked(
        f"torchrun --nproc-per-node=2 launch/train.py {recipe_path} data.shards={folder} run.steps=100000"
    )
    where = f"{index.paths[0]}: sample '{index.keys[0]}' at offset {index.offset[0]}: crc32 is "
    assert done.code != 0 and done.output.count(f"error: {where}") == 1
    assert re.search(rf"failed first: \w+: {re.escape(where)}", done.output)
    assert time.monotonic() - begun < 120, "the other rank does not wait in a collective for its half hour"


class OtherShards(Trainer):
    """Its second rank finds the shards in another order."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        data = recipe.data.model_copy(update={"shards": list(reversed(recipe.data.shards))})
        super().__init__(recipe if mesh.is_main else recipe.model_copy(update={"data": data}), mesh)


def train_others(recipe_path: Path, overrides: list[str]) -> None:
    train(recipe_path, overrides, OtherShards)


def test_ranks_with_different_shards_are_refused(recipe_path: Path, shards: Path) -> None:
    tars = ",".join(str(path) for path in sorted(shards.glob("*.tar")))
    with pytest.raises(RankError, match=r"UserError: data\.shards: rank 1 sees other samples than rank 0"):
        run_ranks(2, train_others, recipe_path, [*SMALL, f"data.shards=[{tars}]"])


def test_a_run_goes_on_with_another_micro_batch_in_the_middle_of_an_epoch(recipe_path: Path) -> None:
    four, other = "data.global_batch_size=4", ["data.micro_batch_size=2", "data.lanes=2"]
    run_ranks(1, train, recipe_path, [four, "run.steps=2"])
    run_ranks(2, train, recipe_path, [four, *other, "run.steps=3"])
    run_ranks(1, train, recipe_path, [four, *other, "run.steps=4"])
    run_dir = recipe_path.parent / "run"
    units = [line["data/unit"] for line in metrics_of(run_dir)]
    assert units == [8, 16, 20, 24], "8 units of 1 sample a step, then 4 of 2"
    assert checkpoint.read_meta(checkpoint.committed(run_dir)[-1]).stream["history"] == [
        {"lanes": 3, "micro_batch_size": 1, "window": 16, "units": 16}
    ]


def test_a_run_mixes_its_shards_and_resumes(recipe_path: Path, shards: Path, tmp_path: Path) -> None:
    """Two entries at 3 to 1, some 4 samples of each."""
    one, two = sorted(str(path) for path in shards.glob("*.tar"))
    mixed = [f"data.shards=[{one},{two}]", "data.weights=[3,1]", "data.max_samples=8", "objective.inner_sample=reuse"]
    run_ranks(1, train, recipe_path, [*mixed, "run.steps=3"])
    state = run_ranks(2, train, recipe_path, [*mixed, "run.steps=5"])[0]
    quiet = run_ranks(1, train, recipe_path, [*mixed, "run.steps=5", f"run.dir={tmp_path}/quiet"])[0]
    assert parameter_difference(state, quiet) < 1e-6
    resumed, alone = metrics_of(recipe_path.parent / "run"), metrics_of(tmp_path / "quiet")
    assert resumed == [pytest.approx(line, rel=1e-4) for line in alone]
    assert resumed[-1]["data/unit"] == 10 and resumed[-1]["data/epoch/0"] >= 1
    with pytest.raises(RankError, match=r"UserError: .*weights is None, the checkpoint's \[3.0, 1.0\] \(set data.weights"):
        run_ranks(1, train, recipe_path, [mixed[0], *mixed[2:], "run.steps=6"])
