"""Alarms on logged numbers: whether one has risen far above where it was.

A number is held against its own past, as its scale differs from model to model. Its median over the last `window` log
lines is compared with the lowest median that any `window` lines had, `warmup` lines after the run's beginning or later.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loguru import logger

from sgmd_dist.watch_sections import AlarmsSection


@dataclass(frozen=True)
class Watched:
    """A logged number by its metric, the recipe's bound on its rise, and what a rise means."""

    metric: str
    bound: Callable[[AlarmsSection], float | None]
    meaning: str


WATCHED = {
    "residual": Watched(
        "fake_score/residual",
        lambda section: section.residual,
        "the fake score loses track of the generator: raise optim.fake_score.lr or objective.fake_updates, or lower"
        " optim.generator.lr",
    ),
    "gap": Watched(
        "generator/teacher_fake_gap",
        lambda section: section.gap,
        "the generator leaves the teacher: lower optim.generator.lr, or go back to an earlier checkpoint",
    ),
    "generator_grad_norm": Watched(
        "generator/grad_norm",
        lambda section: section.grad_norm,
        "the generator's gradients explode: lower optim.generator.lr or optim.max_grad_norm",
    ),
    "fake_score_grad_norm": Watched(
        "fake_score/grad_norm",
        lambda section: section.grad_norm,
        "the fake score's gradients explode: lower optim.fake_score.lr or optim.max_grad_norm",
    ),
}


class Rise:
    """How far a series has risen: the median of its last `window` values over the lowest such median so far."""

    def __init__(self, window: int, warmup: int) -> None:
        self._recent: deque[float] = deque(maxlen=window)
        self._to_pass = warmup
        self._lowest = math.inf

    def add(self, value: float) -> float:
        """The rise after one more value, at least 1; 1 while there are too few values. NaN counts as infinite."""
        if self._to_pass:
            self._to_pass -= 1
            return 1.0
        self._recent.append(math.inf if math.isnan(value) else value)
        if len(self._recent) < (self._recent.maxlen or 0):
            return 1.0
        median = statistics.median(self._recent)
        self._lowest = min(self._lowest, median)
        if math.isinf(median):
            return math.inf
        return median / self._lowest if self._lowest > 0 else 1.0


class Alarm:
    """On from the `patience`-th value in a row on whose rise is beyond `bound`, until one is not."""

    def __init__(self, bound: float, window: int, warmup: int, patience: int) -> None:
        self._rise, self._bound, self._patience = Rise(window, warmup), bound, patience
        self._row = 0
        self.is_on = False
        self.rise = 1.0

    def add(self, value: float) -> bool:
        """Take one more value; True where the alarm goes on by it."""
        self.rise = self._rise.add(value)
        self._row = self._row + 1 if self.rise > self._bound else 0
        was_on, self.is_on = self.is_on, self._row >= self._patience
        return self.is_on and not was_on


class Alarms:
    """The recipe's alarms, on the rank that has the log: each warns once when it goes on.

    Attributes:
        ends_run: an alarm went on, and `health.alarms.stop` says that this ends the training.
    """

    def __init__(self, section: AlarmsSection | None, lines: Iterable[Mapping[str, Any]]) -> None:
        """
        Args:
            lines: what the run has logged so far: alarms stand where they would without an interruption.
        """
        self._section = section
        self._alarms = {} if section is None else _alarms_of(section)
        self.ends_run = False
        for line in lines:
            for name in self._alarms:
                self._add(name, line)

    def look(self, step: int, scalars: Mapping[str, float]) -> dict[str, float]:
        """Judge the numbers logged for optimizer step number `step`; returns 1 or 0 as `health/alarm/<name>`."""
        for name in self._alarms:
            if self._add(name, scalars):
                self._warn(name, step)
        return {
            f"health/alarm/{name}": float(alarm.is_on)
            for name, alarm in self._alarms.items()
            if WATCHED[name].metric in scalars
        }

    def _add(self, name: str, numbers: Mapping[str, Any]) -> bool:
        value = numbers.get(WATCHED[name].metric)
        return value is not None and self._alarms[name].add(value)

    def _warn(self, name: str, step: int) -> None:
        assert self._section is not None
        watched, stop = WATCHED[name], self._section.stop
        self.ends_run = self.ends_run or stop
        logger.warning(
            "step {}: {} is {:.2f} times its lowest, beyond health.alarms' {:g}: {}{}",
            *(step, watched.metric, self._alarms[name].rise, watched.bound(self._section), watched.meaning),
            "; this ends the training" if stop else "",
        )


def _alarms_of(section: AlarmsSection) -> dict[str, Alarm]:
    bounds = {name: watched.bound(section) for name, watched in WATCHED.items()}
    return {
        name: Alarm(bound, section.window, section.warmup, section.patience)
        for name, bound in bounds.items()
        if bound is not None
    }
