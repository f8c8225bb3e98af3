"""Signals that a run answers at the end of a step: requests to stop, by saving, and to profile what follows."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PROFILE_SIGNALS = (signal.SIGUSR2,)


class Request:
    """Set by a signal; read at step boundaries only."""

    is_set = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True


class StopRequest(Request):
    """Set by SIGTERM or SIGUSR1."""


class ProfileRequest(Request):
    """Set by SIGUSR2."""


_R = TypeVar("_R", bound=Request)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the signals of a batch system within the context, instead of ending at once.

    Within another such context the request is that one's: what arrived since it began counts.
    """
    with _caught(StopRequest, STOP_SIGNALS) as request:
        yield request


@contextmanager
def profile_requests() -> Iterator[ProfileRequest]:
    """Catch SIGUSR2 within the context, instead of ending by it; one context within another as of `stop_requests`."""
    with _caught(ProfileRequest, PROFILE_SIGNALS) as request:
        yield request


@contextmanager
def _caught(kind: type[_R], signals: Sequence[signal.Signals]) -> Iterator[_R]:
    outer = getattr(signal.getsignal(signals[0]), "__self__", None)
    request = outer if isinstance(outer, kind) else kind()
    before = {number: signal.signal(number, request.handle) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
