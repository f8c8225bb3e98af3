"""What is seen of a run on a GPU alone: its share of the peak, kernels in the trace, and what its memory held."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgmd_dist.throughput import peak_tflops

REPO = Path(__file__).parents[2]


@pytest.mark.gpu
def test_a_profile_has_kernels_and_allocations_and_the_log_has_the_mfu(tmp_path: Path) -> None:
    command = [sys.executable, "launch/train.py", "recipes/tiny_sgmd.yaml", f"run.dir={tmp_path}/run"]
    overrides = ["run.steps=4", "run.log_every=4", "model.compute_dtype=bfloat16", "logging.profile.steps=[2, 3]"]
    finished = subprocess.run([*command, *overrides], cwd=REPO, env=dict(os.environ), timeout=300, check=False)
    assert finished.returncode == 0
    (line,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert line["perf/tflops_per_gpu"] > 0 and line["perf/peak_bytes"] > 0
    if peak_tflops(torch.cuda.get_device_name()) is not None:
        assert 0 < line["perf/mfu"] < 1
    folder = tmp_path / "run/profile"
    trace = json.loads(gzip.decompress((folder / "step-00000002-rank00000.trace.json.gz").read_bytes()))
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    snapshot = pickle.loads((folder / "step-00000002-rank00000.memory.pickle").read_bytes())
    assert any(snapshot["device_traces"])
