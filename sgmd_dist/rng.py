"""Randomness as a function: every draw is keyed by what it is for, never by rank or by call order.

A draw's key folds (seed, purpose, counters...) with chained splitmix64 steps. Scalars come straight from the
key; tensors come from numpy's Philox, a counter-based generator, started at that key and always evaluated on
the CPU, so that a laptop and a GPU cluster see the same noise and a resumed run needs no generator state.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SampleId:
    """Where a sample stands in the stream: epoch, unit (the micro-batch's number) and index in the unit."""

    epoch: int
    unit: int
    index: int


def splitmix64(value: int) -> int:
    """One step of the splitmix64 mixer (Steele, Lea, Flood 2014): 64-bit integer to 64-bit integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@cache
def _purpose_number(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def key(seed: int, purpose: str, *counters: int) -> int:
    """64-bit key of a draw. Different purposes or counters give independent keys."""
    state = splitmix64(seed & _MASK)
    for part in (_purpose_number(purpose), len(counters), *counters):
        state = splitmix64(state ^ (part & _MASK))
    return state


def uniform(seed: int, purpose: str, *counters: int) -> float:
    """A float64 draw from [0, 1)."""
    return (key(seed, purpose, *counters) >> 11) / float(1 << 53)


def integer(high: int, seed: int, purpose: str, *counters: int) -> int:
    """An integer draw from {0, ..., high - 1}."""
    return (key(seed, purpose, *counters) * high) >> 64


def choice(weights: Sequence[float], seed: int, purpose: str, *counters: int) -> int:
    """An integer draw from {0, ..., len(weights) - 1}, each as probable as its weight is large, never one of weight 0.

    Raises:
        ValueError: the weights' sum is not above 0.
    """
    reached = list(itertools.accumulate(weights))
    if not reached or reached[-1] <= 0:
        raise ValueError(f"rng.choice: weights {list(weights)}: expected a sum above 0")
    place = bisect_right(reached, uniform(seed, purpose, *counters) * reached[-1])
    return min(place, bisect_left(reached, reached[-1]))  # rounding may reach the sum itself


def permutation(size: int, seed: int, purpose: str, *counters: int) -> list[int]:
    """A random order of {0, ..., size - 1}."""
    return sorted(range(size), key=lambda i: key(seed, purpose, *counters, i))


def normal(shape: Sequence[int], seed: int, purpose: str, *counters: int) -> Tensor:
    """Standard normal noise of `shape`, float32, on the CPU."""
    words = [key(seed, purpose, *counters), _purpose_number(purpose)]
    philox = np.random.Philox(key=np.array(words, dtype=np.uint64))  # a list of large ints would become floats
    return torch.from_numpy(np.random.Generator(philox).standard_normal(tuple(shape), dtype=np.float32))


def sample_normal(
    shape: Sequence[int], seed: int, purpose: str, ids: Sequence[SampleId], *counters: int, device: torch.device | str
) -> Tensor:
    """Noise for a batch, one draw per sample: `[len(ids), *shape]`, float32, on `device`."""
    keys = _sample_keys(seed, purpose, ids, counters)
    draws = np.empty((len(ids), *shape), dtype=np.float32)
    philox = np.random.Philox(key=0)
    generator, state = np.random.Generator(philox), philox.state
    words = np.array([0, _purpose_number(purpose)], dtype=np.uint64)
    for i in range(len(ids)):  # one generator for all: to make one takes longer than a small sample's draw
        words[0] = keys[i]
        state["state"]["key"] = words
        philox.state = state
        draws[i] = generator.standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(draws).to(device, non_blocking=True)


def sample_uniform(
    seed: int, purpose: str, ids: Sequence[SampleId], *counters: int, device: torch.device | str
) -> Tensor:
    """One uniform draw from [0, 1) per sample: `[len(ids)]`, float64, on `device`."""
    draws = (_sample_keys(seed, purpose, ids, counters) >> np.uint64(11)) / float(1 << 53)
    return torch.from_numpy(draws).to(device, non_blocking=True)


def _sample_keys(seed: int, purpose: str, ids: Sequence[SampleId], counters: Sequence[int]) -> np.ndarray:
    """`key(seed, purpose, epoch, unit, index, *counters)` of every sample, `[len(ids)]` uint64."""
    state = splitmix64(splitmix64(splitmix64(seed & _MASK) ^ _purpose_number(purpose)) ^ (3 + len(counters)))
    states = np.full(len(ids), state, dtype=np.uint64)
    for place in zip(*((i.epoch & _MASK, i.unit & _MASK, i.index & _MASK) for i in ids), strict=True):
        states = _splitmix64_each(states ^ np.array(place, dtype=np.uint64))
    for counter in counters:
        states = _splitmix64_each(states ^ np.uint64(counter & _MASK))
    return states


def _splitmix64_each(values: np.ndarray) -> np.ndarray:
    """`splitmix64` of every element; arithmetic of unsigned arrays is modulo 2^64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
