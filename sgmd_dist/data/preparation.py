"""Rows to shards, by many ranks and in several attempts: each row is encoded once, or skipped for a reason on record.

    <out>/preparation.json    the settings, which every attempt must share, and the number of attempts
    <out>/skipped/*.jsonl     rows that a rank gave up, appended as it goes
    <out>/skipped.jsonl       all of them, when every row is done

A row is done when a shard or a list of skipped rows holds it; nothing else is remembered. Before each attempt rank 0
completes the shards that a kill cut off, collects what is done and hands out the rest, interleaved, so that any number
of ranks may continue. A shard's name has the attempt and the rank in it: no two writers ever meet.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from sgmd_dist.data.format import NEGATIVE_PROMPT_NAME, read_json, write_negative_prompt
from sgmd_dist.data.index import consolidate, write_sidecars
from sgmd_dist.data.manifest import Row
from sgmd_dist.data.shards import ShardWriter, salvage
from sgmd_dist.durable import lock, write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape
from sgmd_dist.preemption import StopRequest

SKIPPED_NAME = "skipped.jsonl"
_STATE_NAME = "preparation.json"
_SKIPPED_DIR = "skipped"
_LOCK_NAME = "preparation.lock"
_MAX_SAMPLES = 10_000  # of a shard, for captions that are all short
_WAIT = timedelta(days=7)  # for the slowest rank: ranks meet at the beginning and at the end alone

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A row encoded: what `ShardWriter.add` takes. `prompt_embeds` is `[n_tokens, D]`, `image_embeds` `[N, E]`, the
    others have `latent_shape`."""

    prompt_embeds: Tensor
    latents: Tensor | None
    latent_shape: LatentShape
    bucket: str
    source: str
    extra_json: dict[str, Any] = field(default_factory=dict)
    noise: Tensor | None = None
    condition_latents: Tensor | None = None
    image_embeds: Tensor | None = None


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be encoded, and why."""

    reason: str


class RowEncoder(Protocol):
    """Makes samples of rows."""

    def negative_embeds(self) -> Tensor:
        """`[n_tokens, D]` of the data set's negative prompt."""
        ...

    def encode(self, rows: Sequence[Row]) -> Generator[tuple[Row, Sample | Skipped], None, None]:
        """Every row once."""
        ...


@dataclass(frozen=True)
class Summary:
    """What a preparation came to, over all attempts.

    Attributes:
        stopped: the ranks were asked to stop before all rows were done.
        num_new: rows that this attempt did, in `seconds`.
    """

    num_rows: int
    num_encoded: int
    num_skipped: int
    stopped: bool
    num_new: int
    seconds: float

    def text(self) -> str:
        rate = f"{self.num_new} rows in {self.seconds:.0f} s, {self.num_new / max(self.seconds, 1e-9):.2f} rows/s"
        listed = f" ({SKIPPED_NAME})" if self.num_skipped else ""
        if self.stopped:
            left = self.num_rows - self.num_encoded - self.num_skipped
            return f"stopped with {left} of {self.num_rows} rows left; the same command continues ({rate})"
        return f"{self.num_rows} rows: {self.num_encoded} encoded, {self.num_skipped} skipped{listed}; {rate}"


@dataclass(frozen=True)
class _Attempt:
    """What rank 0 found in the folder, the same on all ranks."""

    number: int
    remaining: list[int]  # rows
    num_encoded: int
    num_skipped: int


def prepare(
    out: Path,
    rows: Sequence[Row],
    settings: dict[str, Any],
    encoder: RowEncoder,
    *,
    shard_bytes: int,
    retry_skipped: bool = False,
    stop: StopRequest | None = None,
) -> Summary:
    """Encode the rows that are not done yet into shards of `out`, and index it when all are. Collective.

    Works on the ranks of the default process group, or alone where there is none.

    Args:
        settings: JSON values that decide on the samples; those of the folder's first attempt must be equal.
        shard_bytes: a shard is closed as soon as its tensors take so many.
        retry_skipped: forget which rows were skipped.
        stop: once set, each rank ends its shards after the row in work.

    Raises:
        UserError: `out` holds something else, is worked on, or was begun with other settings; or no row of all could
            be encoded.
    """
    ranks = _Ranks()
    with ExitStack() as held:

        def begin() -> _Attempt:
            _make(out)
            held.enter_context(lock(out / _LOCK_NAME, "another preparation writes here"))
            return _begin(out, rows, settings, encoder, retry_skipped)

        attempt = ranks.from_main(begin)
        shares = set(attempt.remaining[ranks.rank :: ranks.size])
        mine = [row for row in rows if row.number in shares]
        begun = time.monotonic()
        counts = _work(out, mine, encoder, f"a{attempt.number:03d}-r{ranks.rank:04d}", shard_bytes, stop, ranks)
        seconds = time.monotonic() - begun
        encoded, skipped = (sum(column) for column in zip(*ranks.gather(counts), strict=True))
        summary = Summary(
            num_rows=len(rows),
            num_encoded=attempt.num_encoded + encoded,
            num_skipped=attempt.num_skipped + skipped,
            stopped=encoded + skipped < len(attempt.remaining),
            num_new=encoded + skipped,
            seconds=max(ranks.gather(seconds)),
        )
        if not summary.stopped:
            ranks.from_main(lambda: _finish(out, summary))
    return summary


# ----------------------------------------------------------------------------------------------------------- a rank


def _work(
    out: Path,
    rows: Sequence[Row],
    encoder: RowEncoder,
    name: str,
    shard_bytes: int,
    stop: StopRequest | None,
    ranks: _Ranks,
) -> tuple[int, int]:
    """This rank's share; returns how many rows it encoded and how many it skipped."""
    num_encoded = num_skipped = 0
    writers: dict[str, ShardWriter] = {}
    share = f"rank 0 of {ranks.size}" if ranks.size > 1 else out.name
    with (
        closing(encoder.encode(rows)) as results,
        ExitStack() as open_writers,
        tqdm(total=len(rows), desc=share, unit="row", disable=not ranks.is_main, smoothing=0.05) as bar,
    ):
        for row, result in results:
            if isinstance(result, Skipped):
                _append_skipped(out / _SKIPPED_DIR / f"{name}.jsonl", row, result.reason)
                num_skipped += 1
            else:
                if result.bucket not in writers:
                    writers[result.bucket] = open_writers.enter_context(
                        ShardWriter(
                            out,
                            latent_shape=result.latent_shape,
                            bucket=result.bucket,
                            prefix=f"{result.bucket}-{name}",
                            samples_per_shard=_MAX_SAMPLES,
                            max_bytes=shard_bytes,
                        )
                    )
                    open_writers.callback(writers[result.bucket].close)  # after an error too: rows are costly
                writers[result.bucket].add(
                    _key(row.number),
                    result.prompt_embeds,
                    row.caption or "",
                    latents=result.latents,
                    noise=result.noise,
                    condition_latents=result.condition_latents,
                    image_embeds=result.image_embeds,
                    source=result.source,
                    **result.extra_json,
                )
                num_encoded += 1
            bar.update()
            if stop is not None and stop.is_set:
                break
    return num_encoded, num_skipped


def _append_skipped(path: Path, row: Row, reason: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        line = {"row": row.number, "video": row.video, "reason": reason}
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


class _Ranks:
    """The ranks that work together; they may wait days for one another."""

    def __init__(self) -> None:
        together = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self._group: Any = dist.new_group(timeout=_WAIT, backend="gloo") if together else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks; its `UserError` too."""
        if self._group is None:
            return make()
        made: list[Any] = [None, None]
        if self.is_main:
            try:
                made[0] = make()
            except UserError as error:
                made[1] = str(error)
        dist.broadcast_object_list(made, src=0, group=self._group)
        if made[1] is not None:
            raise UserError(made[1])
        return made[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the ranks' order."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values


# ------------------------------------------------------------------------------------------------ rank 0: the folder


def _begin(
    out: Path, rows: Sequence[Row], settings: dict[str, Any], encoder: RowEncoder, retry_skipped: bool
) -> _Attempt:
    """Clean up after a killed attempt, and find what is left to do."""
    number = _count_attempt(out, settings)
    for left in out.glob("*.json.tmp"):
        left.unlink()
    for left in sorted(out.glob("*.tar.tmp")):
        salvage(left)
    if retry_skipped:
        for path in _skipped_lists(out):
            path.unlink()
    if not (out / NEGATIVE_PROMPT_NAME).exists():
        write_negative_prompt(out, encoder.negative_embeds())
    asked = {row.number for row in rows}  # an attempt before may have been asked for more
    encoded = _encoded_rows(out) & asked
    skipped = (_skipped_rows(out).keys() & asked) - encoded
    remaining = [row.number for row in rows if row.number not in encoded and row.number not in skipped]
    return _Attempt(number, remaining, len(encoded), len(skipped))


def _count_attempt(out: Path, settings: dict[str, Any]) -> int:
    """The number of this attempt, from 0. A number that a killed attempt took is not given again."""
    path = out / _STATE_NAME
    if not path.exists():
        if strangers := sorted(out.glob("*.tar")):
            raise UserError(f"{strangers[0]}: is not of this preparation; write into an empty folder")
        state = {"settings": settings, "attempts": 0}
    else:
        state = read_json(path, "delete the folder and begin anew")
        kinds = {"settings": dict, "attempts": int}
        if not isinstance(state, dict) or any(type(state.get(name)) is not kind for name, kind in kinds.items()):
            raise UserError(f"{path}: holds no {' and no '.join(kinds)}; delete the folder and begin anew")
        _check_settings(path, state["settings"], settings)
    number = state["attempts"]
    write_durably(path, json.dumps(state | {"attempts": number + 1}, indent=1).encode())
    return number


def _check_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if differing:
        values = "; ".join(f"{name} was {before.get(name)!r}, is now {now.get(name)!r}" for name in differing)
        raise UserError(
            f"{path}: the folder was begun with other settings: {values}; repeat them, or choose another folder"
        )


def _encoded_rows(out: Path) -> set[int]:
    """The rows in committed shards. A shard that was killed before it had its sidecar gets one."""
    return {int(key) for record in write_sidecars(sorted(out.glob("*.tar"))) for key in record.keys}


def _skipped_lists(out: Path) -> list[Path]:
    return [path for path in (out / SKIPPED_NAME, *sorted((out / _SKIPPED_DIR).glob("*.jsonl"))) if path.exists()]


def _skipped_rows(out: Path) -> dict[int, bytes]:
    """{row: its line}. A line that was cut off by a kill does not count: its row is done again."""
    lines: dict[int, bytes] = {}
    for path in _skipped_lists(out):
        for line in path.read_bytes().split(b"\n")[:-1]:
            lines[int(json.loads(line)["row"])] = line + b"\n"
    return lines


def _finish(out: Path, summary: Summary) -> None:
    lines = _skipped_rows(out)
    if lines:
        write_durably(out / SKIPPED_NAME, b"".join(lines[number] for number in sorted(lines)))
    if summary.num_encoded == 0:
        first = json.loads(lines[min(lines)])
        raise UserError(
            f"{out / SKIPPED_NAME}: all {summary.num_rows} rows were skipped, the first one ({first['video']}) because:"
            f" {first['reason']}; mend the rows and try again with --retry-skipped"
        )
    consolidate(out)


def _key(number: int) -> str:
    return f"{number:08d}"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error}); choose another folder") from None
