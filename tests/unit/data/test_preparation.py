"""Rows become shards in any number of attempts: each row once, none lost, every reason on record."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sgmd_dist.data.format import read_negative_prompt
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.manifest import Row
from sgmd_dist.data.preparation import Sample, Skipped, Summary, prepare
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.durable import lock
from sgmd_dist.errors import UserError
from sgmd_dist.preemption import StopRequest

SETTINGS = {"fps": "16", "buckets": ["a", "b"]}
SHAPES = {"a": (2, 1, 2, 2), "b": (2, 1, 2, 4)}
ROWS = [Row(number, f"{number}.mp4", f"caption {number}") for number in range(20)]


class Numbers:
    """Encodes a row as its number; skips what it is told to, and does something before a row."""

    def __init__(self, skip: Sequence[int] = (), before: dict[int, Callable[[], object]] | None = None) -> None:
        self.skip, self.before = set(skip), before or {}
        self.seen: list[int] = []

    def negative_embeds(self) -> torch.Tensor:
        return torch.full((1, 4), 0.5)

    def encode(self, rows: Sequence[Row]) -> Generator[tuple[Row, Sample | Skipped], None, None]:
        for row in rows:
            self.before.get(row.number, lambda: None)()
            self.seen.append(row.number)
            if row.number in self.skip:
                yield row, Skipped(f"reason {row.number}\u2028")
                continue
            bucket = "ab"[row.number % 2]
            latents = torch.full(SHAPES[bucket], float(row.number))
            yield row, Sample(torch.ones(2, 4), latents, SHAPES[bucket], bucket, row.video or "", {"x": row.number})


def attempt(out: Path, encoder: Numbers | None = None, rows: Sequence[Row] = ROWS, **options: Any) -> Summary:
    """Small shards: 3 samples of either bucket."""
    return prepare(out, rows, options.pop("settings", SETTINGS), encoder or Numbers(), shard_bytes=520, **options)


def die() -> None:
    raise KeyboardInterrupt


def encoded(out: Path) -> list[int]:
    return sorted(int(key) for key in ShardIndex.open(out).keys)


def skipped(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_bytes().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


def test_every_row_is_in_a_shard_of_its_bucket(tmp_path: Path) -> None:
    summary = attempt(tmp_path)
    assert (summary.num_rows, summary.num_encoded, summary.num_skipped, summary.stopped) == (20, 20, 0, False)
    assert summary.text().startswith("20 rows: 20 encoded, 0 skipped; 20 rows in 0 s, ")
    index = ShardIndex.open(tmp_path)
    assert encoded(tmp_path) == list(range(20))
    assert {name: index.latent_shape(name) for name in index.buckets} == SHAPES
    assert len(index.paths) == 8 and not (tmp_path / "skipped.jsonl").exists()
    assert torch.equal(read_negative_prompt(tmp_path), torch.full((1, 4), 0.5).bfloat16())
    assert not list(tmp_path.glob("*.tmp"))


def test_equal_rows_give_equal_shards(tmp_path: Path) -> None:
    attempt(tmp_path / "one")
    attempt(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_skipped_rows_are_listed_with_their_reasons(tmp_path: Path) -> None:
    summary = attempt(tmp_path, Numbers(skip=[7, 3]))
    assert summary.text().startswith("20 rows: 18 encoded, 2 skipped (skipped.jsonl); ")
    assert skipped(tmp_path) == [
        {"row": 3, "video": "3.mp4", "reason": "reason 3\u2028"},
        {"row": 7, "video": "7.mp4", "reason": "reason 7\u2028"},
    ]
    assert encoded(tmp_path) == [number for number in range(20) if number not in (3, 7)]


def test_a_second_call_does_what_the_first_one_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path, Numbers(skip=[1], before={12: die}))
    before = contents(tmp_path)
    assert before and not (tmp_path / "index.json").exists()
    encoder = Numbers(skip=[1])
    summary = attempt(tmp_path, encoder)
    assert (summary.num_encoded, summary.num_skipped) == (19, 1) and summary.num_new == 8
    assert encoder.seen == list(range(12, 20))
    assert contents(tmp_path).items() >= before.items()
    assert encoded(tmp_path) == [number for number in range(20) if number != 1]
    assert [line["row"] for line in skipped(tmp_path)] == [1]


def test_a_third_call_does_nothing(tmp_path: Path) -> None:
    attempt(tmp_path, Numbers(skip=[1]))
    before = contents(tmp_path)
    encoder = Numbers()
    assert attempt(tmp_path, encoder).num_new == 0
    assert encoder.seen == [] and contents(tmp_path) == before
    assert [line["row"] for line in skipped(tmp_path)] == [1]


def test_a_request_to_stop_commits_what_is_done(tmp_path: Path) -> None:
    stop = StopRequest()
    encoder = Numbers(before={6: lambda: stop.handle(15, None)})
    summary = attempt(tmp_path, encoder, stop=stop)
    assert summary.stopped and encoder.seen == list(range(7))
    assert summary.text().startswith("stopped with 13 of 20 rows left; the same command continues (7 rows in ")
    assert not (tmp_path / "index.json").exists()
    encoder = Numbers()
    assert not attempt(tmp_path, encoder).stopped
    assert encoder.seen == list(range(7, 20))
    assert encoded(tmp_path) == list(range(20))


def test_what_a_kill_leaves_is_cleared_or_taken(tmp_path: Path) -> None:
    attempt(tmp_path, stop=stopping_at(5))
    whole = sorted(tmp_path.glob("*.tar"))
    whole[0].with_name(whole[0].name.removesuffix(".tar") + ".index.json").unlink()
    (tmp_path / "a-a000-r0001-000000.tar.tmp").write_bytes(b"half a shard")
    (tmp_path / "a-a000-r0001-000000.index.json.tmp").write_bytes(b"{")
    (tmp_path / "skipped").mkdir()
    (tmp_path / "skipped" / "a000-r0001.jsonl").write_bytes(
        b'{"row": 8, "video": "8.mp4", "reason": "x"}\n{"row": 9, "vid'
    )
    encoder = Numbers()
    assert attempt(tmp_path, encoder).num_skipped == 1
    assert encoder.seen == [5, 6, 7, *range(9, 20)]
    assert encoded(tmp_path) == [number for number in range(20) if number != 8]
    assert not list(tmp_path.glob("*.tmp"))


def stopping_at(number: int) -> StopRequest:
    """Set from the beginning when asked the `number`th time."""

    class Countdown(StopRequest):
        left = number

        @property
        def is_set(self) -> bool:
            self.left -= 1
            return self.left == 0

    return Countdown()


def test_shards_of_other_ranks_count_too(tmp_path: Path) -> None:
    attempt(tmp_path, stop=stopping_at(1))
    with ShardWriter(tmp_path, latent_shape=SHAPES["b"], bucket="b", prefix="b-a000-r0007") as writer:
        for number in (11, 3):
            writer.add(f"{number:08d}", torch.ones(1, 4), "x", latents=torch.zeros(SHAPES["b"]))
    encoder = Numbers()
    attempt(tmp_path, encoder)
    assert encoder.seen == [number for number in range(1, 20) if number not in (11, 3)]


def test_skipped_rows_are_tried_again_when_asked(tmp_path: Path) -> None:
    attempt(tmp_path, Numbers(skip=[3, 7]))
    encoder = Numbers(skip=[7])
    assert attempt(tmp_path, encoder, retry_skipped=True).num_encoded == 19
    assert encoder.seen == [3, 7]
    assert [line["row"] for line in skipped(tmp_path)] == [7]
    attempt(tmp_path, retry_skipped=True)
    assert encoded(tmp_path) == list(range(20)) and not (tmp_path / "skipped.jsonl").exists()


def test_a_folder_of_skipped_rows_alone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"skipped\.jsonl: all 20 rows were skipped, the first one \(0\.mp4\) because: reason 0"
    ):
        attempt(tmp_path, Numbers(skip=range(20)))
    assert len(skipped(tmp_path)) == 20


def test_other_settings_are_named(tmp_path: Path) -> None:
    attempt(tmp_path)
    with pytest.raises(
        UserError,
        match=r"preparation\.json: .* other settings: fps was '16', is now '8'; vae was None, is now 'x'; repeat them",
    ):
        attempt(tmp_path, settings={**SETTINGS, "fps": "8", "vae": "x"})


def test_a_damaged_record_of_settings_is_named(tmp_path: Path) -> None:
    attempt(tmp_path)
    for content in (b"{", b"[]", b"{}", b'{"settings": {}}', b'{"settings": {}, "attempts": "1"}'):
        (tmp_path / "preparation.json").write_bytes(content)
        with pytest.raises(UserError, match=r"preparation\.json: .*delete the folder and begin anew"):
            attempt(tmp_path)


def test_another_data_set_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"shard-000000\.tar: is not of this preparation; write into an empty folder"):
        attempt(tmp_path)


def test_two_preparations_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        lock(tmp_path / "preparation.lock", "x"),
        pytest.raises(UserError, match="another preparation writes here; wait for it, or choose another folder"),
    ):
        attempt(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out: cannot be made"):
        attempt(tmp_path / "file" / "out")
