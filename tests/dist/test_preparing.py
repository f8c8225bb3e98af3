"""Ranks share the rows of a preparation, at one number of ranks after another."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
import torch
from ranks import RankError, run_ranks

from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.manifest import Row
from sgmd_dist.data.preparation import Sample, Skipped, Summary, prepare
from sgmd_dist.parallel.mesh import process_group
from sgmd_dist.preemption import StopRequest

NUM_ROWS = 30
SKIPPED = (4, 11)


class Numbers:
    """Encodes a row as its number and asks to stop before row `last`."""

    def __init__(self, last: int, stop: StopRequest) -> None:
        self.last, self.stop = last, stop
        self.seen: list[int] = []

    def negative_embeds(self) -> torch.Tensor:
        return torch.ones(1, 4)

    def encode(self, rows: Sequence[Row]) -> Generator[tuple[Row, Sample | Skipped], None, None]:
        for row in rows:
            self.stop.is_set = row.number >= self.last
            self.seen.append(row.number)
            if row.number in SKIPPED:
                yield row, Skipped("told to")
            else:
                yield row, Sample(torch.ones(2, 4), torch.full((1, 1, 1, 2), float(row.number)), (1, 1, 1, 2), "b", "")


def attempt(out: Path, last: int, settings: dict[str, str]) -> tuple[Summary, list[int]]:
    rows = [Row(number, f"{number}.mp4", "x") for number in range(NUM_ROWS)]
    stop = StopRequest()
    encoder = Numbers(last, stop)
    with process_group():
        summary = prepare(out, rows, settings, encoder, shard_bytes=100, stop=stop)
    return summary, encoder.seen


def test_rows_are_shared_by_any_number_of_ranks(tmp_path: Path) -> None:
    first = run_ranks(3, attempt, tmp_path, 12, {"a": "b"})
    assert [seen for _, seen in first] == [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13], [2, 5, 8, 11, 14]]
    assert all(summary.stopped and summary.num_new == 15 for summary, _ in first)
    assert len({summary for summary, _ in first}) == 1

    second = run_ranks(2, attempt, tmp_path, NUM_ROWS, {"a": "b"})
    assert [seen for _, seen in second] == [list(range(15, 30, 2)), list(range(16, 30, 2))]
    for summary, _ in second:
        assert (summary.num_encoded, summary.num_skipped, summary.stopped) == (28, 2, False)

    keys = ShardIndex.open(tmp_path).keys
    assert sorted(keys) == [f"{number:08d}" for number in range(NUM_ROWS) if number not in SKIPPED]
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [(4, "told to"), (11, "told to")]

    with pytest.raises(RankError, match="other settings: a was 'b', is now 'c'"):  # on all ranks: none waits for it
        run_ranks(2, attempt, tmp_path, NUM_ROWS, {"a": "c"})
