"""launch/bench.py: what it compares, what it does with times, and what it says where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_forked

from sgmd_dist.benchmarks import attention, kernels
from sgmd_dist.benchmarks.measure import Ceilings, largest_error
from sgmd_dist.benchmarks.shapes import SMALL, WAN, Shapes
from sgmd_kernels.attention import ORDER

CPU = torch.device("cpu")
TINY = {"tiny": Shapes(6, 2, 8, 3, (2, 1, 3, 3))}


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function takes 2 ms, torch.compile's versions 3; the card copies 1000 GB/s and multiplies 10 TFLOP/s."""
    compiled: list[Any] = []

    def compile_(function: Any, **kwargs: Any) -> Any:
        compiled.append(lambda *inputs: function(*inputs))
        return compiled[-1]

    def median_ms(function: Any, repeats: int) -> float:
        function()
        cells = [cell.cell_contents for cell in function.__closure__]
        return 3.0 if any(cell is made for cell in cells for made in compiled) else 2.0

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(Ceilings, "measured", lambda *args: Ceilings(1000.0, 10.0))
    for module in (kernels, attention):
        monkeypatch.setattr(module, "median_ms", median_ms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", [kernels, attention])
def test_on_a_cpu_results_are_compared_and_nothing_is_timed(module: Any, dtype: torch.dtype):
    report = module.run(SMALL, dtype, CPU, 1, timed=False)
    assert report.correct and report.ceilings is None
    compared = [row for row in report.rows if not row.note]
    assert {row.model for row in compared} == set(SMALL)
    assert all(row.error is not None and row.forward_ms is None for row in compared)
    assert "nothing is timed" in report.table() and "fwd ms" not in report.table()


def test_kernels_are_held_against_the_copy_and_against_compile(stopped_clock: None):
    report = kernels.run(TINY, torch.float32, CPU, 1, timed=True)
    rows = {(row.operation, row.variant): row for row in report.rows}
    assert {variant for _, variant in rows} == {"reference", "eager", "compile"}
    row = rows["gated residual", "reference"]
    activations, gate = 6 * 16 * 4, 16 * 4
    assert row.rate == pytest.approx((6 * activations + 3 * gate) / 2e-3 / 1e9)
    assert row.of_ceiling == pytest.approx((row.rate or 0) / 1000)
    assert row.over_compile == 1.5 and rows["gated residual", "compile"].over_compile == 1.0
    assert "copy 1000 GB/s" in report.table()


def test_attention_is_held_against_the_matrix_product(stopped_clock: None):
    report = attention.run(TINY, torch.float32, CPU, 1, timed=True)
    rows = {(row.operation, row.variant): row for row in report.rows}
    # Two products in the forward, five in the backward, each of 2 L K D operations for each head.
    assert rows["cross-attention", "math"].rate == pytest.approx(7 * 2 * 6 * 3 * 16 / 2e-3 / 1e12)
    assert rows["self-attention", "math"].over_compile == 1.5


def test_a_backend_that_cannot_run_has_a_row_that_says_why():
    rows = attention.run(TINY, torch.float32, CPU, 1, timed=False).rows
    assert {row.variant for row in rows} == {*ORDER, "eager"}
    assert {row.note for row in rows if row.variant == "cudnn"} == {"needs a CUDA device"}


def test_a_backend_that_needs_more_memory_than_there_is_is_not_timed(
    stopped_clock: None, monkeypatch: pytest.MonkeyPatch
):
    def out_of_memory(*args: Any) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention, "median_ms", out_of_memory)
    rows = attention.run(TINY, torch.float32, CPU, 1, timed=True).rows
    assert {row.note for row in rows if row.variant == "math"} == {"out of memory"}


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels.residual, "gated_residual", lambda x, y, gate: x + y * gate * 1.01)
    report = kernels.run(TINY, torch.float32, CPU, 1, timed=False)
    assert not report.correct
    assert [line.split()[0] for line in report.table().splitlines() if line.endswith("WRONG")] == ["gated"]


def test_a_result_that_is_no_number_is_wrong():
    ones = [torch.ones(2)]
    assert largest_error([torch.tensor([1.0, torch.nan])], ones, {torch.float32: 1.0})[1] is False


def test_the_wan_models_have_the_tokens_of_their_videos():
    for shapes in WAN.values():
        _, frames, height, width = shapes.latents
        assert shapes.tokens == frames * height // 2 * width // 2
    assert {name: shapes.width for name, shapes in WAN.items()} == {
        "wan2.1-1.3b": 1536,
        "wan2.1-14b": 5120,
        "wan2.2-5b": 3072,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU")
@pytest.mark.parametrize("command", ["kernels", "attention"])
def test_the_command_prints_a_table_and_writes_json(command: str, tmp_path: Path):
    out = tmp_path / "new" / "bench.json"
    done = run_forked(f"python launch/bench.py {command} --models small --dtype float32 --out {out}")
    assert done.code == 0, done.output
    assert done.output.startswith(f"{command}, float32: device ")
    content = json.loads(out.read_text())
    assert content["machine"]["torch"] == torch.__version__ and content["ceilings"] is None
    assert {row["model"] for row in content["rows"]} == {"small"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the models differ")
def test_a_model_that_is_not_there_is_named():
    done = run_forked("python launch/bench.py kernels --models small wan3")
    assert done.code == 2
    assert done.output == "error: --models wan3: on cpu expected some of 'small', 'small per token'\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("module", [kernels, attention])
def test_on_a_gpu_everything_is_timed(module: Any):
    report = module.run(TINY, torch.bfloat16, torch.device("cuda"), 3, timed=True)
    assert report.correct and report.ceilings is not None and report.ceilings.copy_gb_per_s > 0
    assert all((row.forward_backward_ms or 0) > 0 for row in report.rows if not row.note)
