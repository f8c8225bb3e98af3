"""Metrics: recorded on the device with a reduction, reduced over ranks and written when logged."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from loguru import logger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] (protobuf)
from torch import Tensor
from torch.profiler import record_function
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sgmd_dist.durable import append_line, write_durably
from sgmd_dist.wandb_run import WandbRun

Reduction = Literal["mean", "sum"]
_MAKE_ROOM = "training goes on, but checkpoints may fail too: mend the disk"

# What the progress bar shows of the last log line, where the line has it, and the word for it.
IN_BAR = {
    "fake_score/residual": "residual",
    "generator/teacher_fake_gap": "gap",
    "fake_score/loss": "fake",
    "generator/loss": "loss",
    "generator/latent_motion": "motion",
    "perf/tokens_per_s": "tokens/s",
    "perf/mfu": "mfu",
}


class Metrics:
    """Collects scalars between two log lines. Nothing leaves the device before `flush`.

    Every rank records the same names in the same order, as control flow is equal on all ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._reductions: dict[str, Reduction] = {}
        self._timers: dict[str, list[Timer]] = {}

    def record(
        self, name: str, value: Tensor | float, reduce: Reduction = "mean", weight: Tensor | None = None
    ) -> None:
        """Add a scalar, or several as `[B]`. `mean` averages over records and ranks; `sum` adds over both.

        Args:
            weight: `[B]`, how much each value counts; those of weight 0 may be anything, NaN too.
        """
        value = torch.as_tensor(value, dtype=torch.float32, device=self._device).detach()
        weight = torch.ones_like(value) if weight is None else weight.to(self._device, torch.float32)
        total = torch.where(weight > 0, value * weight, 0.0).sum()
        known = name in self._sums
        self._sums[name] = self._sums[name] + total if known else total
        self._weights[name] = self._weights[name] + weight.sum() if known else weight.sum()
        self._reductions[name] = reduce

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure the seconds of a block, on the device's clock, as the metric `name` (mean)."""
        timer = Timer(self._device)
        with record_function(name):  # profiles show the block by the metric's name
            yield
        timer.stop()
        self._timers.setdefault(name, []).append(timer)

    def flush(self) -> dict[str, float]:
        """Reduce over ranks, return the scalars by name, and begin anew. A mean of no weight is left out."""
        for name, timers in self._timers.items():
            for timer in timers:
                self.record(name, timer.seconds())
        names, reductions = list(self._sums), self._reductions
        if not names:
            return {}
        packed = torch.stack([*self._sums.values(), *self._weights.values()])
        dist.all_reduce(packed)
        self._sums, self._weights, self._reductions, self._timers = {}, {}, {}, {}
        sums, weights = packed.view(2, -1).tolist()
        return {
            name: total if reductions[name] == "sum" else total / weight
            for name, total, weight in zip(names, sums, weights, strict=True)
            if weight > 0
        }


class Timer:
    """Seconds between construction and `stop`: CUDA events on a GPU, so that nothing waits; else wall time."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._cuda = device.type == "cuda"
        self._start = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self._stop = self._now()

    def seconds(self) -> float:
        """What was measured; waits for the device."""
        if not self._cuda:
            return self._stop - self._start
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1000


class _Bar(tqdm):
    """A progress bar that ends where stderr takes no more, as on a full disk; tqdm's own ends the training."""

    def display(self, *args: Any, **kwargs: Any) -> None:
        self._unless_lost(lambda: super(_Bar, self).display(*args, **kwargs))

    def close(self) -> None:
        self._unless_lost(super().close)

    def _unless_lost(self, show: Callable[[], object]) -> None:
        try:
            show()
        except OSError as error:
            self.disable = True
            logger.error("the progress bar is not shown any more ({}); {}", error, _MAKE_ROOM)


class RunLog(AbstractContextManager["RunLog"]):
    """Where the main rank writes: metrics.jsonl, TensorBoard, W&B and a progress bar. Other ranks write nothing.

    Training does not end for want of a log: where the disk takes no more, an error in the rank's log says so.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        is_main: bool,
        tensorboard: bool,
        first_step: int,
        num_steps: int,
        wandb: WandbRun | None = None,
    ) -> None:
        self._is_main = is_main
        self._wandb = wandb
        self._path = run_dir / "metrics.jsonl"
        self._writer: SummaryWriter | None = None
        if is_main and tensorboard:
            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._bar = _Bar(
            total=num_steps, initial=first_step, unit="step", disable=not is_main, dynamic_ncols=True, mininterval=1.0
        )
        if is_main:
            _cut_after(self._path, first_step)

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is logged up to now, line by line; nothing on other ranks."""
        if self._is_main and self._path.exists():
            with self._path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def step(self) -> None:
        """Advance the progress bar."""
        self._bar.update()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write the scalars of the steps up to and including optimizer step number `step` (from 1)."""
        if not self._is_main:
            return
        try:
            append_line(self._path, json.dumps({"step": step, "time": round(time.time(), 3), **scalars}))
        except OSError as error:
            logger.error("{}: step {} is not written ({}); {}", self._path, step, error, _MAKE_ROOM)
        for name, value in scalars.items():
            self._to_tensorboard(lambda writer, name=name, value=value: writer.add_scalar(name, value, step))
        if self._wandb is not None:
            self._wandb.write(step, scalars)
        self._bar.set_postfix({word: _shown(scalars[name]) for name, word in IN_BAR.items() if name in scalars})

    def animate(self, name: str, gif: bytes, step: int) -> None:
        """Show an animated picture of optimizer step number `step` in TensorBoard."""
        if self._writer is None:
            return
        with Image.open(io.BytesIO(gif)) as picture:
            width, height = picture.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._to_tensorboard(lambda writer: writer._get_file_writer().add_summary(summary, step))

    def _to_tensorboard(self, report: Callable[[SummaryWriter], None]) -> None:
        """Report to TensorBoard, where it is asked for and until its files cannot be written."""
        if self._writer is None:
            return
        try:
            report(self._writer)
        except OSError as error:
            logger.error("TensorBoard: nothing more is written ({}); {}", error, _MAKE_ROOM)
            self._writer = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._to_tensorboard(SummaryWriter.close)
        if self._wandb is not None:
            self._wandb.close(failed=kind is not None)

    def __enter__(self) -> Self:
        return self


def _shown(value: float) -> str:
    """Three digits; thousands as 12.3k."""
    return tqdm.format_sizeof(value) if 1000 <= value < 1e15 else f"{value:.3g}"


def _cut_after(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run will do again, and a line that a kill left half-written."""
    if not path.exists():
        return
    kept, dropped = [], 0
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            keep = False
        kept, dropped = ([*kept, line], dropped) if keep else (kept, dropped + 1)
    if dropped or not text.endswith("\n"):
        write_durably(path, "".join(f"{line}\n" for line in kept).encode())
    if dropped:
        logger.info("{}: dropped {} lines after step {}, which are done again", path, dropped, step)
