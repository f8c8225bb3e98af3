"""The endless stream of batches of one data-parallel rank, resumable from one integer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from sgmd_dist.batch import Batch
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.plan import PLAN_VERSION, Plan
from sgmd_dist.data.reader import Reader, UnitData, UnitRequest
from sgmd_dist.errors import UserError
from sgmd_dist.rng import SampleId

STATE_VERSION = 1
_MENDS = {
    "version": "resume with the sgmd_dist that wrote the checkpoint",
    "plan": "resume with the sgmd_dist that wrote the checkpoint",
    "seed": "set run.seed to the checkpoint's",
    "lanes": "set data.lanes to the checkpoint's",
    "micro_batch_size": "set data.micro_batch_size to the checkpoint's",
    "window": "set data.window to the checkpoint's",
    "index_sha256": "point data.shards at the data set of the checkpoint, in the same order",
}


class Stream:
    """Rank `dp_rank`'s share of the plan's units, read ahead.

    After a start at unit u0 (0, or what `load_state_dict` restored) the k-th call of `next` delivers unit
    u0 + k dp_size + dp_rank of the plan. Its content is a function of the data set and the plan's parameters, not of
    prefetch, threads or time. A plan's short unit is filled up to `micro_batch_size` with copies of its last sample at
    `valid=False`: all batches have one size, and every sample weighs exactly once per epoch.

    A batch's tensors are its own: the stream reuses their memory only once nobody holds them.

    Args:
        index: the data set.
        seed, lanes, micro_batch_size, window: of the order, see sgmd_dist/data/plan.py.
        text_tokens: T, to which prompt embeddings are cut or zero-padded.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        on_error: "raise" stops at a sample that cannot be read with a `CorruptSample` that names shard, key and
            offset. "skip" delivers its position as zeros at `valid=False` and counts it in `skipped`.
        max_skips: how many positions may be skipped by this rank before "skip" becomes a `UserError` too.
        num_threads, prefetch_units: reading threads and how many units they work ahead.
        check_crc: compare each sample's crc32 with the index (1.3 to 2.4 ms per 8.4 MB of a thread); without it a
            damaged tensor trains silently.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int,
        micro_batch_size: int,
        lanes: int,
        window: int,
        text_tokens: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        max_skips: int = 0,
        num_threads: int = 1,
        check_crc: bool = True,
        prefetch_units: int = 4,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise UserError(f"data.on_error: {on_error!r}: expected 'raise' or 'skip'")
        if not 0 <= dp_rank < dp_size:
            raise UserError(f"data stream: dp_rank {dp_rank} of dp_size {dp_size}: expected 0 <= dp_rank < dp_size")
        for name, value, least in (
            ("max_skips", max_skips, 0),
            ("num_threads", num_threads, 1),
            ("prefetch_units", prefetch_units, 1),
            ("text_tokens", text_tokens, 1),
        ):
            if value < least:
                raise UserError(f"data stream: {name} is {value}, expected {least} or more")
        self.plan = Plan(
            index.bucket, index.shard, seed=seed, lanes=lanes, micro_batch_size=micro_batch_size, window=window
        )
        self.skipped = 0
        self._index, self._dp_rank, self._dp_size = index, dp_rank, dp_size
        self._on_error, self._max_skips, self._text_tokens = on_error, max_skips, text_tokens
        self._num_threads, self._prefetch_units, self._check_crc = num_threads, prefetch_units, check_crc
        self._negative_embeds = _fit(index.negative_prompt(), text_tokens)[None]
        self._unit = 0  # of all ranks: the next call delivers unit _unit + dp_rank
        self._reader: Reader | None = None
        self._failure: UserError | None = None
        self._closed = False

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def unit(self) -> int:
        """The position: how many units all ranks have been delivered since the beginning of epoch 0."""
        return self._unit

    @property
    def epoch(self) -> int:
        """The epoch of the next unit."""
        return self.plan.locate(self._unit)[0]

    def next(self) -> Batch:
        """The next batch. After an error the position stays where it is and the error is raised again."""
        if self._closed:
            raise RuntimeError("this stream is closed")
        if self._failure is not None:
            raise self._failure
        if self._reader is None:
            self._reader = self._open_reader()
        data = self._reader.next()
        self._judge(data)
        self._unit += self._dp_size
        return self._batch(data)

    def state_dict(self) -> dict[str, Any]:
        """The position, after what was delivered, not after what was read ahead.

        `unit` and the plan's parameters are equal on all ranks that made equally many calls; `skipped` is this rank's.
        """
        return {**self._identity(), "unit": self._unit, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, at any `dp_size`.

        Raises `UserError` that names every differing field with both values.
        """
        expected = self._identity()
        differing = [name for name in expected if state.get(name) != expected[name]]
        if differing:
            values = "; ".join(
                f"{name} is {expected[name]!r}, the checkpoint's {state.get(name)!r} ({_MENDS[name]})"
                for name in differing
            )
            raise UserError(
                f"the checkpoint's data position does not fit: {values}; or start anew with run.resume=never"
            )
        for name in ("unit", "skipped"):
            if type(state.get(name)) is not int or state[name] < 0:
                raise UserError(
                    f"the checkpoint's data position: {name} is {state.get(name)!r}, expected an integer >= 0; "
                    "resume from an older checkpoint"
                )
        self._stop_reading()
        self._unit, self.skipped, self._failure = state["unit"], state["skipped"], None

    def close(self) -> None:
        """End the reading threads. May be called twice."""
        self._closed = True
        self._stop_reading()

    def _identity(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "version": STATE_VERSION,
            "plan": PLAN_VERSION,
            "seed": plan.seed,
            "lanes": plan.lanes,
            "micro_batch_size": plan.micro_batch_size,
            "window": plan.window,
            "index_sha256": self._index.fingerprint,
        }

    def _requests(self, number: int) -> Iterator[UnitRequest]:
        while True:
            epoch, unit = self.plan.locate(number)
            yield UnitRequest(epoch, unit, *self.plan.unit(epoch, unit))
            number += self._dp_size

    def _open_reader(self) -> Reader:
        return Reader(
            self._index,
            self._requests(self._unit + self._dp_rank),
            micro_batch_size=self.plan.micro_batch_size,
            text_tokens=self._text_tokens,
            num_threads=self._num_threads,
            depth=self._prefetch_units,
            check_crc=self._check_crc,
        )

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _judge(self, data: UnitData) -> None:
        """Count or raise the unit's errors."""
        errors = [error for error in data.errors if error is not None]
        if not errors:
            return
        if self._on_error == "raise":
            self._failure = errors[0]
        elif self.skipped + len(errors) > self._max_skips:
            self._failure = UserError(
                f"data.max_skips: {self._max_skips}: {self.skipped + len(errors)} samples could not be read; mend the "
                f"shards or raise data.max_skips; the last one: {errors[-1]}"
            )
        if self._failure is not None:
            raise self._failure
        self.skipped += len(errors)

    def _batch(self, data: UnitData) -> Batch:
        request, num_read = data.request, len(data.errors)
        rows = range(self.plan.micro_batch_size)
        last = [min(row, num_read - 1) for row in rows]
        for tensor in (data.prompt_embeds, data.latents):
            if tensor is not None and num_read < len(rows):
                tensor[num_read:] = tensor[num_read - 1]
        return Batch(
            ids=tuple(SampleId(request.epoch, request.unit, row) for row in rows),
            keys=tuple(self._index.keys[request.samples[i]] for i in last),
            latent_shape=self._index.latent_shape(request.bucket),
            prompt_embeds=data.prompt_embeds,
            negative_embeds=self._negative_embeds,
            latents=data.latents,
            valid=torch.tensor([row < num_read and data.errors[row] is None for row in rows]),
        )


def _fit(embeds: Tensor, text_tokens: int) -> Tensor:
    """Cut or zero-pad `[n_tokens, D]` to `[text_tokens, D]`."""
    fitted = embeds.new_zeros(text_tokens, embeds.shape[1])
    count = min(text_tokens, embeds.shape[0])
    fitted[:count] = embeds[:count]
    return fitted
