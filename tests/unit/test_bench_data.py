"""launch/bench.py data: what it measures and how it is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from commands import run_forked

from sgmd_dist.benchmarks.data import Cost, Report, write_samples
from sgmd_dist.data.index import ShardIndex

COSTS = [
    Cost("raw read", cpu_ms=0.5, median_cpu_ms=0.6, wall_ms=1.0),
    Cost("stream", cpu_ms=0.7, median_cpu_ms=0.8, wall_ms=0.5),
    Cost("raw read, 2 threads", cpu_ms=0.6, median_cpu_ms=0.7, wall_ms=0.5),
    Cost("stream, 2 threads", cpu_ms=0.75, median_cpu_ms=0.8, wall_ms=0.5),
    Cost("webdataset", cpu_ms=5.0, median_cpu_ms=6.0, wall_ms=8.0),
]


def test_the_table_holds_all_ways_against_the_raw_read_and_the_stream_against_that_of_as_many_threads() -> None:
    report = Report(96, 8_000_000, 15, 2, COSTS, machine={"device": "x"})
    lines = report.table().splitlines()
    assert lines[2].split() == ["path", "CPU", "ms", "median", "GB/s", "x", "raw"]
    assert lines[3].split() == ["raw", "read", "0.500", "0.600", "8.00", "1.00"]
    assert lines[4].split() == ["stream", "0.700", "0.800", "16.00", "1.40"]
    assert lines[6].split() == ["stream,", "2", "threads", "0.750", "0.800", "16.00", "1.50"]
    assert lines[7].split() == ["webdataset", "5.000", "6.000", "1.00", "10.00"]
    assert lines[8] == "stream / raw read, 1 thread: 1.40, 2 threads: 1.25; within the budget of 1.5"
    slow = replace(report, costs=[COSTS[0], replace(COSTS[1], cpu_ms=0.8), *COSTS[2:]])
    assert slow.table().endswith("1 thread: 1.60, 2 threads: 1.25; OVER the budget of 1.5")
    assert replace(report, is_smoke=True).table().endswith("the figures say nothing")


def test_the_samples_have_the_size_that_the_budget_is_about(tmp_path: Path) -> None:
    write_samples(tmp_path, 1, 512, small=False)
    (num_bytes,) = ShardIndex.open(tmp_path).size
    assert 8.387e6 < num_bytes < 8.389e6


def test_the_command_measures_all_ways_and_keeps_shards_only_where_it_is_told_to(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run_forked(f"python launch/bench.py data --smoke --workers 1 --out {out} --dir {tmp_path / 'shards'}")
    assert done.code == 0, done.output
    content = json.loads(out.read_text())
    cpu_ms = {cost["path"]: cost["cpu_ms"] for cost in content["costs"]}
    assert list(cpu_ms) == [
        "raw read",
        "stream",
        "raw read, 2 threads",
        "stream, 2 threads",
        "stream, 2 threads, crc",
        "webdataset",
        "webdataset, 1 workers",
    ]
    assert all(value > 0 for value in cpu_ms.values())
    assert content["ratios"]["2"] == cpu_ms["stream, 2 threads"] / cpu_ms["raw read, 2 threads"]
    assert content["budget"] == 1.5
    assert content["num_samples"] == 8 == ShardIndex.open(tmp_path / "shards").num_samples
    assert "the figures say nothing" in done.output
