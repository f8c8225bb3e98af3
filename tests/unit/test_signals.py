"""Signals are kept until a run asks for them, from the first import to its end, and do as before afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from sgmd_dist.preemption import Request, profile_requests, stop_requests


@pytest.mark.parametrize(
    "caught, number",
    [(stop_requests, signal.SIGTERM), (stop_requests, signal.SIGUSR1), (profile_requests, signal.SIGUSR2)],
)
def test_a_request_that_came_early_counts_within(
    caught: Callable[[], AbstractContextManager[Request]], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with caught() as outer:
        os.kill(os.getpid(), number)
        with caught() as inner:
            assert inner is outer and inner.is_set
    assert signal.getsignal(number) == before


def test_to_ask_for_a_profile_is_not_to_ask_for_an_end() -> None:
    with stop_requests() as stop, profile_requests() as profile:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert profile.is_set and not stop.is_set
        profile.is_set = False
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.is_set and not profile.is_set
