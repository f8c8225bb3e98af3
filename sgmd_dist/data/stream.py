"""The endless stream of batches of one data-parallel rank, resumable from one integer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

import torch
from loguru import logger
from torch import Tensor

from sgmd_dist.batch import Batch, padded
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.mixture import Mixture
from sgmd_dist.data.plan import PLAN_VERSION, Cut, Past, Plan, choose
from sgmd_dist.data.reader import Reader, UnitData, UnitRequest
from sgmd_dist.errors import UserError
from sgmd_dist.rng import SampleId

STATE_VERSION = 2
_OLDER = {"version": STATE_VERSION, "weights": None, "max_samples": None, "history": []}  # what version 1 had not
_CUT = tuple(field.name for field in fields(Cut))
_MENDS = {
    "version": "resume with the sgmd_dist that wrote the checkpoint",
    "plan": "resume with the sgmd_dist that wrote the checkpoint",
    "seed": "set run.seed to the checkpoint's",
    "weights": "set data.weights to the checkpoint's",
    "max_samples": "set data.max_samples to the checkpoint's",
    "index_sha256": "point data.shards at the data set of the checkpoint, in the same order",
}


class Stream:
    """Rank `dp_rank`'s share of the plan's units, read ahead.

    After a start at unit u0 (0, or what `load_state_dict` restored) the k-th call of `next` delivers unit
    u0 + k dp_size + dp_rank of the plan. Its content is a function of the data set, the plan's parameters and their
    history, not of prefetch, threads or time. A plan's short unit is filled up to `micro_batch_size` with copies of its
    last sample at `valid=False`: all batches have one size, and every sample weighs exactly once per epoch.

    A batch's tensors are its own: the stream reuses their memory only once nobody holds them.

    Args:
        index: the data set.
        seed, lanes, micro_batch_size, window: of the order, see sgmd_dist/data/plan.py.
        text_tokens: T, to which prompt embeddings are cut or zero-padded.
        weights: the proportions in which the entries of data.shards are mixed, see sgmd_dist/data/mixture.py. By
            default every sample comes once per epoch.
        max_samples: use so many samples of the data set, chosen at random by the seed.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        on_error: "raise" stops at a sample that cannot be read with a `CorruptSample` that names shard, key and
            offset. "skip" delivers its position as zeros at `valid=False` and counts it in `skipped`.
        max_skips: how many positions may be skipped before "skip" becomes a `UserError` too.
        skips_are_shared: the caller counts the skips of all ranks, with `take_lost` and `settle`. Without it this rank
            counts its own.
        num_threads, prefetch_units: reading threads and how many units they work ahead.
        check_crc: compare each sample's crc32 with the index (1.3 to 2.4 ms per 8.4 MB of a thread); without it a
            damaged tensor trains silently.
        retries, read_timeout_s: how often a read that failed for want of the disk or the network is repeated, and the
            time after which a sample counts as unreadable.
        device: where the batches' large tensors are delivered; CUDA copies one batch ahead.
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
        weights: Sequence[float] | None = None,
        max_samples: int | None = None,
        dp_rank: int = 0,
        dp_size: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        max_skips: int = 0,
        skips_are_shared: bool = False,
        num_threads: int = 1,
        check_crc: bool = True,
        retries: int = 0,
        read_timeout_s: float | None = None,
        prefetch_units: int = 4,
        device: torch.device | None = None,
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
            ("max_samples", 1 if max_samples is None else max_samples, 1),
        ):
            if value < least:
                raise UserError(f"data stream: {name} is {value}, expected {least} or more")
        self._index, self._dp_rank, self._dp_size, self._seed = index, dp_rank, dp_size, seed
        self._weights = None if weights is None else [float(weight) for weight in weights]
        self._max_samples = max_samples
        self.plan = self._make_plan(Cut(lanes, micro_batch_size, window), [])
        self.skipped = 0
        self._history: list[Past] = []
        self._on_error, self._max_skips, self._text_tokens = on_error, max_skips, text_tokens
        self._skips_are_shared = skips_are_shared
        self._lost: list[str] = []
        self._reading: dict[str, Any] = {
            "text_tokens": text_tokens,
            "num_threads": num_threads,
            "depth": prefetch_units,
            "check_crc": check_crc,
            "retries": retries,
            "read_timeout_s": read_timeout_s,
            "device": device,
        }
        self._negative_embeds = negative_embeds(index, text_tokens).to(device)
        self._unit = 0  # of all ranks: the next call delivers unit _unit + dp_rank
        self._reader: Reader | None = None
        self._retries = 0  # of readers that are closed
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
    def epochs(self) -> list[int]:
        """The epoch of the next unit; with weights, of the next one of each entry of data.shards."""
        return self.plan.epochs(self._unit)

    @property
    def retries(self) -> int:
        """How many reads this rank repeated since the stream was made."""
        return self._retries + (0 if self._reader is None else self._reader.retries)

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

    def take_lost(self) -> list[str]:
        """What this rank could not read and skipped since the last call, a message for each position."""
        lost, self._lost = self._lost, []
        return lost

    def settle(self, num_lost: int, messages: Sequence[str]) -> None:
        """Count positions that ranks lost; `messages` say what they were.

        Raises:
            UserError: more than `max_skips` are lost. The stream is over then.
        """
        self.skipped += num_lost
        for message in messages:
            logger.warning("skipped {} of data.max_skips = {}: {}", self.skipped, self._max_skips, message)
        if self.skipped > self._max_skips:
            self._failure = UserError(
                f"data.max_skips: {self._max_skips}: {self.skipped} samples could not be read; mend the shards or raise"
                f" data.max_skips; the last one: {messages[-1] if messages else 'named in the log'}"
            )
            raise self._failure

    def state_dict(self) -> dict[str, Any]:
        """The position, after what was delivered, not after what was read ahead.

        Equal on all ranks that made equally many calls and settled what they lost.
        """
        history = [{**asdict(past.cut), "units": past.units} for past in self._history]
        return {
            **self._identity(),
            **asdict(self.plan.cut),
            "history": history,
            "unit": self._unit,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, at any `dp_size`.

        Where lanes, micro_batch_size or window differ from the saved ones, the samples that are left of the epoch are
        put into order anew: each still comes once.

        Raises `UserError` that names every other differing field with both values.
        """
        if state.get("version") == 1:
            state = {**state, **_OLDER}
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
        for name, least in (("unit", 0), ("skipped", 0), *((name, 1) for name in _CUT)):
            if not _is_count(state.get(name), least):
                raise UserError(
                    f"the checkpoint's data position: {name} is {state.get(name)!r}, expected an integer >= {least}; "
                    "resume from an older checkpoint"
                )
        self._history = _history_until_now(state, self.plan.cut)
        self._stop_reading()
        self.plan = self._make_plan(self.plan.cut, self._history)
        self._unit, self.skipped, self._failure, self._lost = state["unit"], state["skipped"], None, []
        changes = [name for name in _CUT if state[name] != getattr(self.plan.cut, name)]
        if changes:
            values = ", ".join(f"data.{name} was {state[name]}, is {getattr(self.plan.cut, name)}" for name in changes)
            logger.info("{}: what is left of the epoch is put into order anew at unit {}", values, self._unit)

    def close(self) -> None:
        """End the reading threads. May be called twice."""
        self._closed = True
        self._stop_reading()

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "plan": PLAN_VERSION,
            "seed": self._seed,
            "weights": self._weights,
            "max_samples": self._max_samples,
            "index_sha256": self._index.fingerprint,
        }

    def _make_plan(self, cut: Cut, history: Sequence[Past]) -> Plan | Mixture:
        index, seed = self._index, self._seed
        used = None if self._max_samples is None else choose(self._max_samples, index.num_samples, seed)
        options: dict[str, Any] = {**asdict(cut), "seed": seed, "history": history, "used": used}
        if self._weights is None:
            return Plan(index.bucket, index.shard, **options)
        return Mixture(index.bucket, index.shard, index.entry[index.shard], self._weights, **options)

    def _requests(self, number: int) -> Iterator[UnitRequest]:
        while True:
            yield UnitRequest(*self.plan.at(number))
            number += self._dp_size

    def _open_reader(self) -> Reader:
        requests = self._requests(self._unit + self._dp_rank)
        return Reader(self._index, requests, micro_batch_size=self.plan.cut.micro_batch_size, **self._reading)

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._retries += self._reader.retries
            self._reader.close()
            self._reader = None

    def _judge(self, data: UnitData) -> None:
        """Note or raise the unit's errors."""
        errors = [error for error in data.errors if error is not None]
        if errors and self._on_error == "raise":
            self._failure = errors[0]
            raise self._failure
        self._lost += map(str, errors)
        if self._lost and not self._skips_are_shared:
            self.settle(len(self._lost), self.take_lost())

    def _batch(self, data: UnitData) -> Batch:
        request = data.request
        ids = [SampleId(request.epoch, request.unit, row) for row in range(self.plan.cut.micro_batch_size)]
        return batch_of(data, self._index, ids, self._negative_embeds)


def batch_of(data: UnitData, index: ShardIndex, ids: Sequence[SampleId], negative: Tensor) -> Batch:
    """A unit as a batch of `len(ids)` positions: those beyond its samples repeat the last one at `valid=False`.

    `negative`: what `negative_embeds` returns.
    """
    num_read = len(data.errors)
    last = [min(row, num_read - 1) for row in range(len(ids))]
    for tensor in data.tensors.values():
        if num_read < len(ids):
            tensor[num_read:] = tensor[num_read - 1]
    return Batch(
        ids=tuple(ids),
        keys=tuple(index.keys[data.request.samples[row]] for row in last),
        latent_shape=index.latent_shape(data.request.bucket),
        prompt_embeds=data.prompt_embeds,
        negative_embeds=negative,
        latents=data.latents,
        valid=torch.tensor([row < num_read and data.errors[row] is None for row in range(len(ids))]),
        noise=data.noise,
        condition_latents=data.condition_latents,
        image_embeds=data.image_embeds,
    )


def negative_embeds(index: ShardIndex, text_tokens: int) -> Tensor:
    """The data set's negative prompt, cut or zero-padded: `[1, text_tokens, D]` bf16."""
    return padded(index.negative_prompt(), text_tokens)[None]


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _history_until_now(state: dict[str, Any], now: Cut) -> list[Past]:
    """The parts of the stream before a saved position, where it continues with the cut `now`."""
    history = state.get("history")
    names = {*_CUT, "units"}
    if not isinstance(history, list) or not all(
        isinstance(past, dict) and past.keys() == names and all(_is_count(value, 1) for value in past.values())
        for past in history
    ):
        raise UserError(
            f"the checkpoint's data position: history is {history!r}, expected a list of"
            f" {{{', '.join(sorted(names))}}}; resume from an older checkpoint"
        )
    pasts = [Past(Cut(**{name: past[name] for name in _CUT}), past["units"]) for past in history]
    saved, since = Cut(**{name: state[name] for name in _CUT}), state["unit"] - sum(past.units for past in pasts)
    if since < 0:
        raise UserError(
            f"the checkpoint's data position: unit is {state['unit']}, its history has {state['unit'] - since};"
            " resume from an older checkpoint"
        )
    if saved == now:
        return pasts
    if since:
        return [*pasts, Past(saved, since)]
    # Nothing was read since the last change: where that is taken back, the part before it continues.
    return pasts[:-1] if pasts and pasts[-1].cut == now else pasts
