"""launch/bench.py checkpoint: what it measures and how it is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from commands import run_forked

from sgmd_dist.assemble import build_model
from sgmd_dist.benchmarks.checkpoint import Report, Timing, random_wan
from sgmd_dist.recipe_file import load_recipe

REPO = Path(__file__).parents[2]
SYNC = Timing("sync", stall_s=2.0, total_s=2.0, num_bytes=4_000_000_000, step_s=None, lost_s=2.0)
ASYNC = Timing("async", stall_s=0.1, total_s=4.0, num_bytes=4_000_000_000, step_s=0.5, lost_s=0.3)


def test_the_table_holds_both_modes_against_the_budget() -> None:
    report = Report(150_000_000, 2, 3, 0.4, SYNC, ASYNC, {"device": "x"})
    lines = report.table().splitlines()
    assert lines[1] == "150M trained parameters, 2 ranks, medians of 3; a step takes 0.400 s without a save"
    assert lines[3].split() == ["sync", "2.000", "2.000", "4.00", "2.00", "-", "2.000"]
    assert lines[4].split() == ["async", "0.100", "4.000", "4.00", "1.00", "0.500", "0.300"]
    assert lines[5] == "async stall / sync stall: 5.0%, within the budget of 10%"
    slow = replace(report, asynchronous=replace(ASYNC, stall_s=0.5))
    assert slow.table().endswith("async stall / sync stall: 25.0%, OVER the budget of 10%")


def test_the_random_networks_have_about_the_size_that_was_asked_for() -> None:
    for millions in (50, 150):
        recipe = load_recipe(REPO / "recipes/tiny_sgmd.yaml", random_wan(millions))
        with torch.device("meta"):
            module = build_model(recipe, "generator").build()
        assert abs(sum(p.numel() for p in module.parameters()) / 1e6 - millions) < 0.25 * millions


def test_the_command_measures_saves_beside_steps_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run_forked(
        f"python launch/bench.py checkpoint --recipe recipes/tiny_sgmd.yaml --repeats 1 --dir {tmp_path} --out {out}"
    )
    assert done.code == 0, done.output
    content = json.loads(out.read_text())
    assert content["synchronous"]["num_bytes"] == content["asynchronous"]["num_bytes"] > 0
    assert content["asynchronous"]["total_s"] >= content["asynchronous"]["stall_s"] > 0
    assert content["stall_ratio"] == content["asynchronous"]["stall_s"] / content["synchronous"]["stall_s"]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
