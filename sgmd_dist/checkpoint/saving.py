"""Writing checkpoints: at once, or from a copy while training goes on.

The copy is made while the next step's forward and backward passes only read the weights; `Saver.wait_staged` stands
before whatever writes to weights, moments or averages. Everything after the copy, from the checks to the commit, runs
in one thread and over a process group of its own, so that it meets no collective of the training.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from loguru import logger
from torch.distributed.checkpoint.api import CheckpointException

from sgmd_dist.checkpoint import folder
from sgmd_dist.checkpoint.agreement import RankFailure, failure_of, together
from sgmd_dist.checkpoint.staging import Staging
from sgmd_dist.checkpoint.state import Tree, is_finite, local_checksums, training_state
from sgmd_dist.checksum import wrap
from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.roles import Roles


@dataclass(frozen=True)
class Request:
    """A checkpoint to be, without its tensors; equal on all ranks.

    stream: the loader's state. recipe: the resolved recipe as YAML. keep: how many checkpoints stay.
    layout: mesh axes and number of ranks, for people.
    """

    run_dir: Path
    step: int
    stream: dict[str, Any]
    recipe: str
    keep: int
    layout: dict[str, int] = field(default_factory=dict)

    @property
    def final(self) -> Path:
        return folder.path_of(self.run_dir, self.step)

    @property
    def aside(self) -> Path:
        return self.final.with_suffix(".tmp")


class Saver:
    """Writes the checkpoints of a run, one at a time. Made, and called, on all ranks in the same order.

    Args:
        asynchronous: train on while a copy in host memory, as large as this rank's part of the state, is written.
    """

    def __init__(
        self, run_dir: Path, *, recipe: str, keep: int, asynchronous: bool, layout: dict[str, int] | None = None
    ) -> None:
        self._run_dir = run_dir
        self._recipe = recipe
        self._keep = keep
        self._layout = layout or {}
        self._asynchronous = asynchronous
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group: dist.ProcessGroup | None = group
        self._thread = ThreadPoolExecutor(1, "checkpoint", *_on_this_device())
        self._staging = Staging()
        self._staged: Future[Tree] | None = None
        self._written: Future[Path] | None = None

    def save(self, roles: Roles, *, step: int, stream: dict[str, Any]) -> None:
        """Save the present state; where asynchronous, return before it is copied. Waits for the save before.

        Raises:
            UserError: this save, or the asynchronous one before it, failed; the same on every rank.
        """
        self.wait()
        stream = json.loads(json.dumps(stream))
        request = Request(self._run_dir, step, stream, self._recipe, self._keep, self._layout)
        tree = training_state(roles)
        if not self._asynchronous:
            write(request, lambda: tree, self._group)
            return
        self._staging.follow(tree)
        staged = self._thread.submit(self._staging.copy, tree)
        self._staged, self._written = staged, self._thread.submit(write, request, staged.result, self._group)

    @property
    def is_staging(self) -> bool:
        """True from an asynchronous `save` until `wait_staged`, alike on all ranks."""
        return self._staged is not None

    def wait_staged(self) -> None:
        """Return when the save in flight, if any, reads the live tensors no more: they may be written then."""
        if self._staged is not None:
            wait([self._staged])
            self._staged = None

    @property
    def is_writing(self) -> bool:
        """True while this rank's part of an asynchronous save is not over."""
        return self._written is not None and not self._written.done()

    @property
    def has_failed(self) -> bool:
        """True once this rank knows that the save in flight failed. Others may know later; `wait` brings all to it."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def wait(self) -> None:
        """Return when no save is in flight.

        Raises:
            UserError: it failed, and nothing was committed; the same on every rank.
        """
        self.wait_staged()
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Let the save in flight end, also where training failed; what becomes of it is in the log."""
        try:
            self.wait()
        except Exception as error:  # the caller may be on its way out with the error that matters
            logger.error("{}", error)
        self._thread.shutdown()
        self._group = None


def _on_this_device() -> tuple[Callable[..., None], tuple[Any, ...]] | tuple[None, tuple[()]]:
    """What a new thread has to do first: CUDA's current device is the thread's own, and begins as the first one."""
    if not torch.cuda.is_available():
        return None, ()
    return torch.cuda.set_device, (torch.cuda.current_device(),)


def save(run_dir: Path, roles: Roles, *, step: int, stream: dict[str, Any], recipe: str, keep: int) -> Path:
    """Write and commit the checkpoint of `step`, then prune all but the newest `keep` up to it. Collective.

    Checkpoints of later steps, from which nothing continues when a run goes back to an earlier one, stay.

    Args:
        stream: the loader's state, equal on all ranks.
        recipe: the resolved recipe as YAML.

    Raises:
        UserError: a tensor is not finite, or a rank cannot write; on every rank, and nothing is committed.
    """
    tree = training_state(roles)
    return write(Request(run_dir, step, stream, recipe, keep), lambda: tree)


def write(request: Request, tree: Callable[[], Tree], group: dist.ProcessGroup | None = None) -> Path:
    """Check, write, commit and prune. Collective over `group`; returns the checkpoint's folder.

    Raises:
        UserError: see `save`.
    """
    began = time.monotonic()
    try:
        num_tensors, checksums = _check(request, tree, group)
        dcp.save(tree(), checkpoint_id=request.aside, process_group=group)
        digests = together(lambda: _digests_of_own_files(request.aside), group)
        meta = folder.Meta(
            request.step,
            request.stream,
            num_tensors,
            checksums,
            digests={name: digest for part in digests for name, digest in part.items()},
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            layout=request.layout,
        )
        together(lambda: _complete(request, meta), group)
    except (CheckpointException, RankFailure) as error:
        failure = failure_of(error) if isinstance(error, CheckpointException) else error
        if dist.get_rank() == 0:
            shutil.rmtree(request.aside, ignore_errors=True)  # a full disk should not stay full of it
        raise UserError(
            f"{request.final}: not saved: {failure}; mend the disk or folder and start again from the checkpoint before"
        ) from error
    if dist.get_rank() == 0:
        logger.info("saved {} in {:.1f} s", request.final, time.monotonic() - began)
    return request.final


def _check(
    request: Request, tree: Callable[[], Tree], group: dist.ProcessGroup | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Clear the place and refuse weights that are no numbers; returns tensors and checksum per tree."""

    def look() -> tuple[bool, dict[str, int]]:
        if dist.get_rank() == 0 and request.aside.exists():
            shutil.rmtree(request.aside)
        return is_finite(tree()), local_checksums(tree())

    found = together(look, group)
    if not all(finite for finite, _ in found):  # good checkpoints would be pruned for them
        raise UserError(
            f"{request.run_dir}: training diverged: weights of step {request.step} are not finite and are not saved;"
            " lower optim.*.lr, and continue from the newest checkpoint"
        )
    num_tensors = {name: len(part) for name, part in tree().items()}
    return num_tensors, {name: wrap(sum(checksums[name] for _, checksums in found)) for name in num_tensors}


def _digests_of_own_files(aside: Path) -> dict[str, str]:
    """Digests of the files that this rank has written; they lie in its machine's cache still."""
    return {path.name: folder.digest(path) for path in aside.glob(f"__{dist.get_rank()}_*")}


def _complete(request: Request, meta: folder.Meta) -> None:
    """Describe and commit what all ranks have written, on the main rank."""
    if dist.get_rank() != 0:
        return
    aside = request.aside
    write_durably(aside / folder.RECIPE_FILE, request.recipe.encode())
    own = {name: folder.digest(aside / name) for name in (folder.METADATA_FILE, folder.RECIPE_FILE)}
    folder.write_meta(aside, replace(meta, digests=meta.digests | own))
    folder.commit(aside, request.final)
    folder.prune(request.run_dir, request.final, request.keep)
