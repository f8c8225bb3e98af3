"""Work that every rank does and none goes on from alone: where it fails on one rank, it fails alike on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from sgmd_dist.errors import UserError, describe

T = TypeVar("T")


class RankFailure(Exception):
    """What failed on a rank, in one line."""


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Call `work` on every rank; returns what it returned, by rank. Collective, over a group with a CPU backend.

    Raises:
        UserError: as one rank's `work` raised it; the same on every rank.
        RankFailure: `work` raised something else on a rank; the same on every rank.
    """
    outcome: Any
    try:
        outcome = work()
    except UserError as error:
        outcome = error
    except Exception as error:
        outcome = RankFailure(f"rank {dist.get_rank()}: {describe(error)}")
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group=group)
    for found in outcomes:
        if isinstance(found, UserError | RankFailure):
            raise found
    return outcomes


def failure_of(error: CheckpointException) -> RankFailure:
    """What DCP, which tells every rank of every rank's exception, says of the first."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return RankFailure(f"rank {rank}: {describe(cause)}")
