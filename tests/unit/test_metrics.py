"""Metrics are reduced when they are logged; metrics.jsonl holds each step once, whatever was killed."""

from __future__ import annotations

import io
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from loguru import logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sgmd_dist.metrics import Metrics, RunLog


@pytest.fixture
def metrics(alone: torch.device) -> Metrics:
    return Metrics(alone)


def test_a_mean_is_over_the_records_and_a_sum_adds_them(metrics: Metrics) -> None:
    for value in (1.0, 2.0, 6.0):
        metrics.record("loss", value)
        metrics.record("passes", value, reduce="sum")
    assert metrics.flush() == {"loss": 3.0, "passes": 9.0}


def test_values_of_no_weight_count_for_nothing(metrics: Metrics) -> None:
    """A mean is over what is valid, not over the records' means; a value without weight may be anything."""
    metrics.record("loss", torch.tensor([1.0, 2.0, 6.0]), weight=torch.tensor([True, True, True]))
    metrics.record("loss", torch.tensor([11.0, math.nan, math.inf]), weight=torch.tensor([True, False, False]))
    metrics.record("none", torch.tensor([5.0, math.nan]), weight=torch.zeros(2, dtype=torch.bool))
    metrics.record("broken", torch.tensor([1.0, math.nan]), weight=torch.ones(2))
    values = metrics.flush()
    assert values["loss"] == 5.0 and math.isnan(values["broken"]) and "none" not in values


def test_a_flush_begins_anew(metrics: Metrics) -> None:
    metrics.record("loss", 1.0)
    metrics.flush()
    assert metrics.flush() == {}
    metrics.record("loss", 5.0)
    assert metrics.flush() == {"loss": 5.0}


def test_tensors_of_any_kind_are_recorded_without_their_graph(metrics: Metrics) -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    metrics.record("graph", weight * 3)
    metrics.record("half", torch.tensor(0.5, dtype=torch.bfloat16))
    metrics.record("count", torch.tensor(7))
    metrics.record("flag", True)
    assert metrics.flush() == {"graph": 6.0, "half": 0.5, "count": 7.0, "flag": 1.0}


def test_values_that_are_not_finite_are_reported_as_they_are(metrics: Metrics) -> None:
    metrics.record("nan", math.nan)
    metrics.record("inf", math.inf)
    metrics.record("fine", 1.0)
    values = metrics.flush()
    assert math.isnan(values["nan"]) and math.isinf(values["inf"]) and values["fine"] == 1.0


def test_a_timed_block_is_the_mean_of_its_seconds(metrics: Metrics) -> None:
    for pause in (0.01, 0.03):
        with metrics.timed("time/step_s"):
            time.sleep(pause)
    assert 0.02 <= metrics.flush()["time/step_s"] < 1


def test_a_block_that_fails_is_not_timed(metrics: Metrics) -> None:
    with pytest.raises(ValueError, match="stop"), metrics.timed("time/step_s"):
        raise ValueError("stop")
    assert metrics.flush() == {}


# metrics.jsonl


def write_steps(run_dir: Path, steps: list[int], *, first_step: int = 0, tensorboard: bool = False) -> None:
    with RunLog(run_dir, is_main=True, tensorboard=tensorboard, first_step=first_step, num_steps=10) as log:
        for step in steps:
            log.step()
            log.write(step, {"generator/loss": step / 10})


def steps_in(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_line_has_step_time_and_the_scalars(tmp_path: Path) -> None:
    write_steps(tmp_path, [5])
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    content = json.loads(line)
    assert content.pop("time") == pytest.approx(time.time(), abs=60)
    assert content == {"step": 5, "generator/loss": 0.5}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path, is_main=False, tensorboard=True, first_step=0, num_steps=10) as log:
        log.step()
        log.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_drops_the_steps_that_it_does_again(tmp_path: Path) -> None:
    write_steps(tmp_path, [1, 2, 3, 4])
    write_steps(tmp_path, [3, 4, 5], first_step=2)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "rubbish", ['{"step": 2, "ti', "", "5", "null", "[1]", '{"step": null}', '{"step": "x"}', '{"time": 1}']
)
def test_lines_that_are_no_metrics_are_dropped(tmp_path: Path, rubbish: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{rubbish}\n')
    write_steps(tmp_path, [2], first_step=1)
    assert steps_in(tmp_path) == [1, 2]


def test_bytes_that_are_no_text_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\x00\n')
    write_steps(tmp_path, [2], first_step=1)
    assert steps_in(tmp_path) == [1, 2]


def test_a_last_line_without_its_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    write_steps(tmp_path, [3], first_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_an_empty_file_is_a_beginning(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    write_steps(tmp_path, [1])
    assert steps_in(tmp_path) == [1]


def test_what_was_logged_before_can_be_read_again(tmp_path: Path) -> None:
    write_steps(tmp_path, [1, 2, 3])
    for is_main, steps in ((True, [1, 2]), (False, [])):
        with RunLog(tmp_path, is_main=is_main, tensorboard=False, first_step=2, num_steps=10) as log:
            assert [line["step"] for line in log.lines()] == steps


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """The log's errors, and a terminal that is no file."""
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}", level="ERROR")
    yield lines
    logger.remove(sink)


@contextmanager
def a_disk_with_room_for(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond that, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_under_the_terminal_s_log_costs_the_bar_and_not_the_run(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115  # its close raises too
    monkeypatch.setattr(sys, "stderr", full)
    write_steps(tmp_path, [1, 2])
    assert steps_in(tmp_path) == [1, 2]
    [line] = logged
    assert "the progress bar is not shown any more ([Errno 28]" in line
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, logged: list[str]) -> None:
    write_steps(tmp_path, [1])
    room = (tmp_path / "metrics.jsonl").stat().st_size + 20  # for a part of a line
    with RunLog(tmp_path, is_main=True, tensorboard=False, first_step=1, num_steps=10) as log:
        with a_disk_with_room_for(room):
            log.write(2, {"generator/loss": 0.5})
        log.write(3, {"generator/loss": 0.5})
    assert steps_in(tmp_path) == [1, 3]
    [line] = logged
    assert "metrics.jsonl: step 2 is not written ([Errno 27] File too large); training goes on" in line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is TensorBoard's own thread
def test_tensorboard_too_does_not_end_it(tmp_path: Path, logged: list[str]) -> None:
    with RunLog(tmp_path, is_main=True, tensorboard=True, first_step=0, num_steps=10) as log:
        room = max(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir())
        with a_disk_with_room_for(room):
            until = time.monotonic() + 20
            while not logged and time.monotonic() < until:
                log.write(1, {"generator/loss": 0.5})
                time.sleep(0.01)
        assert any("TensorBoard: nothing more is written" in line for line in logged)
        picture = io.BytesIO()
        Image.new("RGB", (2, 2)).save(picture, "GIF")
        log.animate("samples/generator", picture.getvalue(), 1)
        log.write(2, {"generator/loss": 0.5})
    assert steps_in(tmp_path)[-1] == 2


def test_the_bar_shows_where_the_run_is_and_its_main_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, is_main=True, tensorboard=False, first_step=4, num_steps=10) as log:
        log.step()
        log.write(5, {"fake_score/residual": 0.125, "perf/tokens_per_s": 12345.0, "perf/mfu": 0.4, "data/wait_s": 1.0})
    last = capsys.readouterr().err.split("\r")[-1]
    assert "5/10 [" in last and "residual=0.125, tokens/s=12.3k, mfu=0.4]" in last


# TensorBoard


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    write_steps(tmp_path, [1, 2, 3, 4], tensorboard=True)
    write_steps(tmp_path, [3, 4, 5], first_step=2, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("generator/loss")] == [1, 2, 3, 4, 5]


def test_no_tensorboard_folder_unless_asked_for(tmp_path: Path) -> None:
    write_steps(tmp_path, [1])
    assert not (tmp_path / "tensorboard").exists()
