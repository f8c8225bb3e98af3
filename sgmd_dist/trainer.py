"""A run: optimizer steps to `run.steps`, resumed, saved, logged and stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from loguru import logger

from sgmd_dist import checkpoint
from sgmd_dist.assemble import build_model, build_networks, build_objective
from sgmd_dist.data.sources import open_shards
from sgmd_dist.data.stream import Stream
from sgmd_dist.durable import lock, write_durably
from sgmd_dist.errors import EXIT_DONE, EXIT_PREEMPTED
from sgmd_dist.metrics import RunLog
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.preemption import stop_requests
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import dump_recipe
from sgmd_dist.resume import begin
from sgmd_dist.stepper import Stepper

LOCK_FILE = ".lock"


class Trainer(Stepper):
    """A run: the loop over optimizer steps, its folder, checkpoints, log and stop signals."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.run_dir = Path(recipe.run.dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()
        self._stop = self._held.enter_context(stop_requests())
        if mesh.is_main:
            self._held.enter_context(lock(self.run_dir / LOCK_FILE, "run.dir is in use by another run"))
        objective = build_objective(recipe)
        self.stream = open_stream(recipe, mesh)
        networks = build_networks(recipe, mesh, objective.roles)
        super().__init__(recipe, mesh, objective, networks, self.stream)
        self.saver = checkpoint.Saver(
            self.run_dir,
            recipe=dump_recipe(recipe),
            keep=recipe.checkpoint.keep,
            asynchronous=recipe.checkpoint.asynchronous,
            layout=asdict(mesh.layout),
        )

    def resume(self) -> None:
        """Continue where `run.resume` says: the newest committed checkpoint, a given one, or nowhere."""
        found = begin(self.recipe, self.roles, is_main=self.mesh.is_main)
        if found is not None:
            self.stream.load_state_dict(found.meta.stream)
            self.step = found.meta.step
            logger.info("resumed {} at step {}", found.path, self.step)

    def save(self) -> None:
        """Save a checkpoint of the present step, or begin to, where that is asynchronous. Collective."""
        with self.metrics.timed("time/save_s"):
            self.saver.save(self.roles, step=self.step, stream=self.stream.state_dict())

    def fit(self) -> int:
        """Train up to `run.steps`; returns the exit code: 0 done, 75 preempted after saving."""
        self.resume()
        if self.mesh.is_main:
            write_durably(self.run_dir / checkpoint.RECIPE_FILE, dump_recipe(self.recipe).encode())
        steps, every = self.recipe.run.steps, self.recipe.checkpoint.every
        if self.step >= steps:
            logger.info("step {} of run.steps = {} is done already", self.step, steps)
        log = RunLog(
            self.run_dir,
            is_main=self.mesh.is_main,
            tensorboard=self.recipe.logging.tensorboard,
            first_step=self.step,
            num_steps=steps,
        )
        with log:
            while self.step < steps:
                self.train_step()
                stopping, failed = _any_rank(self._stop.is_set, self.saver.has_failed)
                if failed:
                    self.saver.wait()  # raises, on every rank
                self._log(log, at_once=stopping)
                if self.step % every == 0 or self.step == steps or stopping:
                    self.save()
                if stopping and self.step < steps:
                    logger.warning("asked to stop: saved step {}, exit code {}", self.step, EXIT_PREEMPTED)
                    break
            self.saver.wait()
        dist.barrier()  # launchers kill the other ranks when one has ended: none may still be writing
        return EXIT_DONE if self.step >= steps else EXIT_PREEMPTED

    def before_write(self) -> None:
        """Wait until a save in flight has copied the tensors that the optimizer is about to change."""
        if self.saver.is_staging:
            with self.metrics.timed("time/save_wait_s"):
                self.saver.wait_staged()

    def _log(self, log: RunLog, *, at_once: bool) -> None:
        log.step()
        if self.step % self.recipe.run.log_every and self.step != self.recipe.run.steps and not at_once:
            return
        self.metrics.record("data/unit", self.stream.state_dict()["unit"])
        log.write(self.step, self.take_scalars())

    def close(self) -> None:
        """Let a save in flight end; stop the stream's threads; give up the run folder and the signals."""
        self.saver.close()
        self.stream.close()
        self._held.close()


def open_stream(recipe: Recipe, mesh: Mesh) -> Stream:
    """This rank's share of the recipe's data; the main rank makes the shards of prompts and worlds. Collective."""
    data = recipe.data
    with _main_first(mesh):
        index = open_shards(recipe, build_model(recipe, "generator"))
    return Stream(
        index,
        seed=recipe.run.seed,
        micro_batch_size=data.micro_batch_size,
        lanes=data.lanes,
        window=data.window,
        text_tokens=recipe.model.text_tokens,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        on_error=data.on_error,
        max_skips=data.max_skips,
        num_threads=data.threads,
    )


def _any_rank(*values: bool) -> list[bool]:
    """Which of the values are true on any rank. Collective."""
    flags = torch.tensor(values, dtype=torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


@contextmanager
def _main_first(mesh: Mesh) -> Iterator[None]:
    """Run the block on the main rank first, then on the others: they find what it wrote."""
    if not mesh.is_main:
        dist.barrier()
    try:
        yield
    finally:
        if mesh.is_main:
            dist.barrier()
