"""Requests to stop: signals that a run answers at the end of a step, by saving."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Set by SIGTERM or SIGUSR1; read at step boundaries only."""

    is_set = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the signals of a batch system within the context, instead of ending at once.

    Within another such context the request is that one's: what arrived since it began counts.
    """
    outer = getattr(signal.getsignal(SIGNALS[0]), "__self__", None)
    request = outer if isinstance(outer, StopRequest) else StopRequest()
    before = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
