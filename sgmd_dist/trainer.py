"""The training loop. It knows roles, phases and units, and no objective's or model's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from loguru import logger

from sgmd_dist import checkpoint
from sgmd_dist.assemble import build_model, build_networks, build_objective
from sgmd_dist.batch import Batch
from sgmd_dist.data.sources import open_shards
from sgmd_dist.data.stream import Stream
from sgmd_dist.durable import lock, write_durably
from sgmd_dist.errors import EXIT_DONE, EXIT_PREEMPTED
from sgmd_dist.metrics import Metrics, RunLog
from sgmd_dist.objectives.base import Phase, StepState
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.parallel.sequence import agree
from sgmd_dist.preemption import stop_requests
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import dump_recipe
from sgmd_dist.resume import begin
from sgmd_dist.roles import build_roles
from sgmd_kernels import dispatch

LOCK_FILE = ".lock"


class Trainer:
    """A run: roles, stream, and the loop over optimizer steps."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.run_dir = Path(recipe.run.dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()
        self._stop = self._held.enter_context(stop_requests())
        if mesh.is_main:
            self._held.enter_context(lock(self.run_dir / LOCK_FILE, "run.dir is in use by another run"))
        self.step = 0
        self.objective = build_objective(recipe)
        self.stream = self._open_stream()
        networks = build_networks(recipe, mesh, self.objective.roles)
        self.roles = build_roles(
            networks,
            {name for name, trained in self.objective.roles.items() if trained},
            recipe.optim,
            recipe.run.steps,
            recomputes=recipe.parallel.activation_checkpointing != "none",
        )
        self.roles.warm_up(mesh.device)
        self.metrics = Metrics(mesh.device)
        self._steps_since_log = 0
        self._keeps_batches = False

    def _open_stream(self) -> Stream:
        data = self.recipe.data
        with _main_first(self.mesh):
            index = open_shards(self.recipe, build_model(self.recipe, "generator"))
        return Stream(
            index,
            seed=self.recipe.run.seed,
            micro_batch_size=data.micro_batch_size,
            lanes=data.lanes,
            window=data.window,
            text_tokens=self.recipe.model.text_tokens,
            dp_rank=self.mesh.dp_rank,
            dp_size=self.mesh.dp_size,
            on_error=data.on_error,
            max_skips=data.max_skips,
            num_threads=data.threads,
        )

    def resume(self) -> None:
        """Continue where `run.resume` says: the newest committed checkpoint, a given one, or nowhere."""
        found = begin(self.recipe, is_main=self.mesh.is_main)
        if found is not None:
            meta = checkpoint.load(found, self.roles)
            self.stream.load_state_dict(meta.stream)
            self.step = meta.step
            logger.info("resumed {} at step {}", found, self.step)

    def save(self) -> None:
        """Write and commit a checkpoint of the present step. Collective."""
        with self.metrics.timed("time/save_s"):
            checkpoint.save(
                self.run_dir,
                self.roles,
                step=self.step,
                stream=self.stream.state_dict(),
                recipe=dump_recipe(self.recipe),
                keep=self.recipe.checkpoint.keep,
            )

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
                stopping = _any_rank(self._stop.is_set)
                self._log(log, at_once=stopping)
                if self.step % every == 0 or self.step == steps or stopping:
                    self.save()
                if stopping and self.step < steps:
                    logger.warning("asked to stop: saved step {}, exit code {}", self.step, EXIT_PREEMPTED)
                    break
        dist.barrier()  # launchers kill the other ranks when one has ended: none may still be writing
        return EXIT_DONE if self.step >= steps else EXIT_PREEMPTED

    def train_step(self) -> None:
        """One optimizer step: the objective's phases in order."""
        fused = dispatch.fused(self.recipe.parallel.kernels, self.mesh.device.type, dispatch.triton_installed())
        state = StepState(self.step, self.recipe.run.seed, self.mesh.layout.num_units, fused=fused)
        phases = self.objective.phases(self.step)
        self._keeps_batches = any(phase.data == "same" for phase in phases)
        with self.metrics.timed("time/step_s"):
            for phase in phases:
                with self.metrics.timed(f"time/{phase.role}_s"):
                    self._train_phase(phase, state)
        self.step += 1

    def _train_phase(self, phase: Phase, state: StepState) -> None:
        self.roles.train_only(phase.role)
        layout = self.mesh.layout
        for micro in range(layout.accumulation):
            state.unit_index = micro * layout.dp_size + self.mesh.dp_rank
            batch = self._batch(phase, state)
            losses = phase.loss(self.roles, batch, state)
            loss = (losses.per_sample * batch.valid).mean()
            (loss / layout.accumulation).backward()
            for name, value in losses.metrics.items():
                self.metrics.record(name, value)
        self.metrics.record(f"{phase.role}/grad_norm", self.roles.step(phase.role, state.step))

    def _batch(self, phase: Phase, state: StepState) -> Batch:
        if phase.data == "same":
            return state.batches[state.unit_index]
        batch = self.stream.next().to(self.mesh.device)
        batch = replace(batch, valid=agree(batch.valid, self.mesh.sequence))
        if self._keeps_batches:
            state.batches.setdefault(state.unit_index, batch)
        return batch

    def _log(self, log: RunLog, *, at_once: bool) -> None:
        log.step()
        self._steps_since_log += 1
        if self.step % self.recipe.run.log_every and self.step != self.recipe.run.steps and not at_once:
            return
        sharers = self.mesh.layout.sequence_size  # each does a part of every pass
        scale = self.recipe.data.global_batch_size * self._steps_since_log * sharers
        self._steps_since_log = 0
        for name, passes in self.roles.take_passes().items():
            self.metrics.record(f"passes/{name}", passes / scale, reduce="sum")
        self.metrics.record("data/unit", self.stream.state_dict()["unit"])
        log.write(self.step, self.metrics.flush())

    def close(self) -> None:
        """Stop the stream's threads; give up the run folder and the signals."""
        self.stream.close()
        self._held.close()


def _any_rank(value: bool) -> bool:
    flag = torch.tensor(int(value), dtype=torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


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
