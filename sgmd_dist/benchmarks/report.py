"""Rows of a benchmark as a table and as JSON, with the machine that they were measured on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sgmd_dist.benchmarks.measure import Ceilings

_NAMES, _TIMES = ("operation", "model", "variant"), ("fwd ms", "fwd+bwd ms", "rate", "of ceiling", "to compile")


@dataclass
class Row:
    """One variant of one operation.

    forward_ms, forward_backward_ms: medians; None where nothing was timed.
    rate: of the forward and backward together, in the unit of the report, counting the least work that they need.
    of_ceiling: that rate over the measured ceiling.
    over_compile: how many times as fast as torch.compile's version of the same, forward and backward.
    error: largest error over largest value, of output and gradients, against float64; None where nothing was compared.
    correct: whether that is within the tolerance of the dtypes.
    note: why there is no number.
    """

    operation: str
    model: str
    variant: str
    shape: list[int]
    forward_ms: float | None = None
    forward_backward_ms: float | None = None
    rate: float | None = None
    of_ceiling: float | None = None
    over_compile: float | None = None
    error: float | None = None
    correct: bool = True
    note: str = ""

    def cells(self, timed: bool) -> list[str]:
        """The row as text: names, times where there are any, error, and what else is to be said."""
        times = [
            _number(self.forward_ms, ".3f"),
            _number(self.forward_backward_ms, ".3f"),
            _number(self.rate, ".0f"),
            _number(self.of_ceiling, ".0%"),
            _number(self.over_compile, ".2f"),
        ]
        note = self.note if self.correct else " ".join(filter(None, ("WRONG", self.note)))
        return [self.operation, self.model, self.variant, *(times if timed else []), _number(self.error, ".1e"), note]


@dataclass
class Report:
    """A benchmark's rows. `rate_unit`: GB/s or TFLOP/s; ceilings are None where nothing was timed."""

    command: str
    dtype: str
    rate_unit: str
    ceilings: Ceilings | None
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=lambda: machine())

    @property
    def correct(self) -> bool:
        return all(row.correct for row in self.rows)

    def compare_with_compile(self) -> None:
        """Fill in `over_compile` where the same operation was measured under torch.compile."""
        compiled = {
            (row.operation, row.model): row.forward_backward_ms for row in self.rows if row.variant == "compile"
        }
        for row in self.rows:
            reference = compiled.get((row.operation, row.model))
            if reference is not None and row.forward_backward_ms is not None:
                row.over_compile = reference / row.forward_backward_ms

    def table(self) -> str:
        """The rows under a head that names the machine and its ceilings."""
        head = [f"{self.command}, {self.dtype}: " + ", ".join(f"{key} {value}" for key, value in self.machine.items())]
        if self.ceilings is None:
            head.append("no CUDA device: correctness only, nothing is timed")
        else:
            head.append(
                f"ceilings in this run: copy {self.ceilings.copy_gb_per_s:.0f} GB/s, matrix product"
                f" {self.ceilings.matrix_tflops:.0f} TFLOP/s; rate in {self.rate_unit}"
            )
        timed = self.ceilings is not None
        lines = [[*_NAMES, *(_TIMES if timed else ()), "error", ""], *(row.cells(timed) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join([*head, *(_aligned(line, widths) for line in lines)])

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = asdict(self)
        path.write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, str]:
    """The device and the versions that decide its speed."""
    facts = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()}
    facts["torch"] = torch.__version__
    if torch.version.cuda is not None:
        facts["CUDA"] = torch.version.cuda
    for package in ("triton", "flash-attn", "flash-attn-4"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def _aligned(cells: list[str], widths: list[int]) -> str:
    """Names to the left, numbers to the right, and the last cell as it is."""
    names = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)][: len(_NAMES)]
    numbers = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)][len(_NAMES) : -1]
    return "  ".join([*names, *numbers, cells[-1]]).rstrip()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
