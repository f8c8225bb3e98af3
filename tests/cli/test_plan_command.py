"""`launch/plan.py`: the table, the verdict, the advice and the JSON."""

from __future__ import annotations

import json
from pathlib import Path

from commands import run_forked


def test_the_shipped_recipe_fits_its_machine_without_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = run_forked(
        f"python launch/plan.py recipes/sgmd.yaml --nodes 8 --gpus-per-node 8 --gpu-memory 80 --json {file}"
        " --bandwidth 200/25 --mfu 0.5"
    )
    assert done.code == 0, done.output
    assert "FITS: at most" in done.output and "17 F in all" in done.output
    content = json.loads(file.read_text())
    assert content["fits"] is True
    assert content["machine"]["inter_bandwidth"] == 25 and content["machine"]["mfu"] == 0.5


def test_what_does_not_fit_is_told_what_would() -> None:
    done = run_forked("python launch/plan.py recipes/sgmd_wan2.1_1.3b.yaml parallel.activation_checkpointing=none")
    assert done.code == 0, done.output
    assert "DOES NOT FIT" in done.output
    assert "It fits with parallel.activation_checkpointing=block" in done.output


def test_a_machine_that_does_not_divide_is_one_message() -> None:
    done = run_forked("python launch/plan.py recipes/sgmd_wan2.1_1.3b.yaml --nodes 5")
    assert done.code == 2
    assert len(done.errors()) == 1 and "data.global_batch_size = 16 is not a multiple of" in done.errors()[0]


def test_numbers_that_are_none_are_refused() -> None:
    assert run_forked("python launch/plan.py recipes/sgmd.yaml --bandwidth 300").code == 2
    assert run_forked("python launch/plan.py recipes/sgmd.yaml --mfu 1.5").code == 2


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_planned(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for where, message in ((tmp_path, "is a folder; name a file"), (tmp_path / "taken/x.json", "taken is no folder")):
        done = run_forked(f"python launch/plan.py recipes/sgmd_wan2.1_1.3b.yaml --json {where}")
        assert done.code == 2 and done.output.startswith(f"error: --json {where}: ") and message in done.output
