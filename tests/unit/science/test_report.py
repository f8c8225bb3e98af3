"""Tables and curves, of results that are written out here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgmd_dist.benchmarks.science.methods import DMD2, SGMD
from sgmd_dist.benchmarks.science.report import Report, exits_table, spread, world_table
from sgmd_dist.benchmarks.science.training import Curve, Point


def curve(method: str, seed: int, cost: float, quality: list[float]) -> Curve:
    points = [
        Point(i, cost * i, i / 10, {"swd": swd, "speed_ratio": 1.0 - swd}) for i, swd in enumerate([0.5, *quality])
    ]
    exits = [{"swd": swd, "speed_ratio": 0.5 + swd} for swd in (0.4, quality[-1])]
    metrics = {"generator/alpha": 0.1 * (seed + 1)} if method == SGMD else {}
    return Curve("toy", method, 1e-3, seed, points, metrics, exits)


METHODS = {
    SGMD: [curve(SGMD, 0, 10, [0.2, 0.1]), curve(SGMD, 1, 10, [0.4, 0.2])],
    DMD2: [curve(DMD2, 0, 40, [0.3, 0.2]), curve(DMD2, 1, 40, [0.3, 0.2])],
}


def test_a_row_says_what_a_method_reached_and_for_how_much() -> None:
    lines = world_table("toy", METHODS).splitlines()
    assert lines[0] == "toy: 2 seeds; before distillation swd 0.500, speed_ratio 0.50"
    head, _, sgmd, dmd2 = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    row = dict(zip(head, sgmd, strict=True))
    assert row["best swd"] == "0.150 ± 0.071" and row["its passes"] == "20 ± 0"
    assert row["passes per step"] == "10.0" and row["CPU ms per step"] == "100.0"
    assert row["passes to 0.200"] == "15 ± 7" and row["CPU s to 0.200"] == "0.2 ± 0.1"
    assert row["speed_ratio there"] == "0.85 ± 0.07"
    assert dict(zip(head, dmd2, strict=True))["passes to 0.200"] == "80 ± 0"


def test_a_target_that_a_seed_misses_is_counted() -> None:
    missing = {**METHODS, SGMD: [METHODS[SGMD][0], curve(SGMD, 1, 10, [0.4, 0.3])]}
    assert "| 10 (1 of 2) |" in world_table("toy", missing)


def test_others_are_timed_to_the_last_and_to_the_best_score_of_dmd2() -> None:
    worse_in_the_end = {**METHODS, DMD2: [curve(DMD2, 0, 40, [0.1, 0.3]), curve(DMD2, 1, 40, [0.3, 0.3])]}
    head, _, sgmd, dmd2 = (line.split(" | ") for line in world_table("toy", worse_in_the_end).splitlines()[2:])
    timed = [name for name in head if " to " in name]
    assert timed == ["passes to 0.300", "CPU s to 0.300", "passes to 0.200", "CPU s to 0.200"]
    assert dict(zip(head, dmd2, strict=True))["passes to 0.200"] == "40 (1 of 2)"
    assert dict(zip(head, sgmd, strict=True))["passes to 0.200"] == "15 ± 7"


def test_the_exits_of_the_chain_are_told_apart() -> None:
    diverged = Curve("toy", DMD2, 1e-3, 2, METHODS[DMD2][0].points, diverged=True)
    fast = curve(SGMD, 0, 10, [0.0, 0.1])  # its speed is the teacher's where its swd is 0
    lines = exits_table({SGMD: [fast, METHODS[SGMD][1]], DMD2: [*METHODS[DMD2], diverged]}).splitlines()
    assert lines[0] == "| method | swd by exit | speed_ratio by exit | swd at speed_ratio 1 | alpha |"
    assert lines[2] == "| SGMD | 0.400, 0.150 | 0.90, 0.65 | 0.000 (1 of 2) | 0.150 |"
    assert lines[3] == f"| {DMD2} | 0.400, 0.200 | 0.90, 0.70 | never | - |"
    assert exits_table({DMD2: [diverged]}) == "every training diverged"


def test_one_value_has_no_spread() -> None:
    assert spread([0.25], 2) == "0.25" and spread([1.0, 3.0], 1) == "2.0 ± 1.4"


def test_the_report_is_written_as_json_table_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `science` is not installed")
    Report("a command", {"toy": METHODS}).write(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["command"] == "a command" and len(content["curves"]["toy"][SGMD]) == 2
    assert (tmp_path / "tables.md").read_text().startswith("toy: 2 seeds")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
