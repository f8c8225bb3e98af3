"""One rank on a GPU trains the tiny recipe in bfloat16 with the objective's passes and finite numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.gpu
def test_the_tiny_recipe_trains_in_bfloat16(tmp_path: Path) -> None:
    command = [sys.executable, "launch/train.py", "recipes/tiny_sgmd.yaml", f"run.dir={tmp_path}/run"]
    overrides = ["run.steps=10", "run.log_every=10", "model.compute_dtype=bfloat16"]
    finished = subprocess.run([*command, *overrides], cwd=REPO, env=dict(os.environ), timeout=300, check=False)
    assert finished.returncode == 0
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    scalars = json.loads(line)
    assert all(math.isfinite(value) for value in scalars.values())
    assert 0 < scalars["generator/grad_norm"] < 10
