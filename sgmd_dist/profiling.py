"""Profiles of a few optimizer steps, on demand: what a rank did when, and on a GPU what its memory held.

    run.dir/profile/step-00000012-rank00003.trace.json.gz   for https://ui.perfetto.dev
    run.dir/profile/step-00000012-rank00003.memory.pickle   for https://docs.pytorch.org/memory_viz, of a GPU

Each rank decides for itself and the others need not know: recording is no collective, and changes nothing that is
trained.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from loguru import logger
from torch.profiler import ProfilerActivity, profile

from sgmd_dist.errors import UserError
from sgmd_dist.layout import Layout
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.preemption import ProfileRequest
from sgmd_dist.recipe import Recipe
from sgmd_dist.watch_sections import ProfileSection

FOLDER = "profile"  # of a run folder
_MEMORY_EVENTS = 500_000


def check(recipe: Recipe, layout: Layout) -> None:
    """Refuse to profile ranks that there are not.

    Raises:
        UserError: `logging.profile.ranks` has such a rank.
    """
    ranks = recipe.logging.profile.ranks
    if max(ranks) >= layout.world_size:
        raise UserError(
            f"logging.profile.ranks = {ranks}: there are {layout.world_size} ranks, numbered from 0; give ranks that"
            " there are"
        )


class Profiler(AbstractContextManager["Profiler"]):
    """Records this rank's steps where the recipe or a signal asks for it; leaving the context ends a recording."""

    def __init__(self, section: ProfileSection, run_dir: Path, mesh: Mesh, request: ProfileRequest) -> None:
        self._section, self._request = section, request
        self._folder, self._rank, self._on_gpu = run_dir / FOLDER, mesh.rank, mesh.device.type == "cuda"
        self._steps = section.steps if mesh.rank in section.ranks else None
        self._recording: profile | None = None
        self._first = self._last = 0
        logger.info("process {}: kill -USR2 records {} steps", os.getpid(), section.signal_steps)

    def before_step(self, step: int) -> None:
        """Begin or end a recording, where optimizer step number `step` (from 1) is the next."""
        if self._recording is not None and step > self._last:
            self._end()
        if self._recording is None and (last := self._wanted_until(step)):
            self._begin(step, last)

    def _wanted_until(self, step: int) -> int | None:
        """The last step of a recording that is to begin with `step`; None where nobody asks for one."""
        if self._request.is_set:
            return step + self._section.signal_steps - 1
        if self._steps is not None and self._steps[0] <= step <= self._steps[1]:
            return self._steps[1]
        return None

    def _begin(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._recording = profile(activities=activities, record_shapes=True)
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS, stacks="python")
        self._recording.start()
        logger.info("profiling steps {} to {} of rank {}", first, last, self._rank)

    def _end(self) -> None:
        """Write what was recorded. A signal that arrived meanwhile counts as answered."""
        recording, self._recording = self._recording, None
        assert recording is not None
        recording.stop()
        self._request.is_set = False
        stem = self._folder / f"step-{self._first:08d}-rank{self._rank:05d}"
        try:
            self._folder.mkdir(exist_ok=True)
            _write_trace(recording, stem.with_suffix(".trace.json.gz"))
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(stem.with_suffix(".memory.pickle")))
        except OSError as error:
            logger.warning("{}: the profile cannot be written ({}); training goes on", self._folder, error)
        else:
            logger.info("profile written: {}", stem.with_suffix(".trace.json.gz"))
        finally:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recording is not None:
            self._end()


def _write_trace(recording: profile, path: Path) -> None:
    """Write the trace packed: at the lowest level, since the other ranks wait, and torch's own packing takes longer."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        plain, packed = Path(folder) / "trace.json", Path(folder) / "packed"
        recording.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target, 2**20)
        packed.rename(path)
