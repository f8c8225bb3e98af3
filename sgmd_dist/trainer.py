"""A run: optimizer steps to `run.steps`, resumed, saved, logged and stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from loguru import logger

from sgmd_dist import checkpoint
from sgmd_dist.alarms import Alarms
from sgmd_dist.assemble import build_model, build_networks, build_objective
from sgmd_dist.batch import Batch
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.sources import open_shards
from sgmd_dist.data.stream import Stream
from sgmd_dist.durable import lock, write_durably
from sgmd_dist.errors import EXIT_DONE, EXIT_PREEMPTED, UserError
from sgmd_dist.health import MotionWatch
from sgmd_dist.metrics import RunLog
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.parallel.sequence import agree
from sgmd_dist.preemption import profile_requests, stop_requests
from sgmd_dist.profiling import Profiler
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import dump_recipe
from sgmd_dist.resume import begin
from sgmd_dist.rollback import Rollbacks
from sgmd_dist.stepper import Stepper
from sgmd_dist.training_samples import TrainingSamples
from sgmd_dist.wandb_run import WandbRun

LOCK_FILE = ".lock"
End = Literal["done", "stopped", "failing"]


class Trainer(Stepper):
    """A run: the loop over optimizer steps, its folder, checkpoints, log and stop signals."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.run_dir = Path(recipe.run.dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()
        self._stop = self._held.enter_context(stop_requests())
        profile = self._held.enter_context(profile_requests())
        self._profiler = Profiler(recipe.logging.profile, self.run_dir, mesh, profile)
        if mesh.is_main:
            self._held.enter_context(lock(self.run_dir / LOCK_FILE, "run.dir is in use by another run"))
        objective = build_objective(recipe)
        index = open_index(recipe, mesh)
        self.stream = open_stream(recipe, mesh, index)
        networks = build_networks(recipe, mesh, objective.roles)
        self._retries_logged = 0
        self._batches_read = _AgreedBatches(self.stream, mesh)
        super().__init__(recipe, mesh, objective, networks, self._batches_read)
        motion = recipe.health.motion
        self._motion = None if motion is None else MotionWatch(motion, recipe, mesh, index, self.roles)
        samples = recipe.samples
        self._samples = None if samples is None else TrainingSamples(samples, recipe, mesh, self.roles)
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
            self._continue_from(found)
            logger.info("resumed {} at step {}", found.path, self.step)
        self._rollbacks = Rollbacks(self.run_dir, self.recipe.health, self.recipe.run.seed, is_main=self.mesh.is_main)
        self.noise_seed = self._rollbacks.noise_seed

    def save(self) -> None:
        """Save a checkpoint of the present step, or begin to, where that is asynchronous. Collective."""
        with self.metrics.timed("time/save_s"):
            self.saver.save(self.roles, step=self.step, stream=self.stream.state_dict())

    def fit(self) -> int:
        """Train up to `run.steps`; returns the exit code: 0 done, or ended by `health`; 75 preempted after saving."""
        self.resume()
        if self.mesh.is_main:
            write_durably(self.run_dir / checkpoint.RECIPE_FILE, dump_recipe(self.recipe).encode())
        if self.step >= self.recipe.run.steps:
            logger.info("step {} of run.steps = {} is done already", self.step, self.recipe.run.steps)
        while (end := self._train()) == "failing":
            self._go_back()
        dist.barrier()  # launchers kill the other ranks when one has ended: none may still be writing
        return EXIT_PREEMPTED if end == "stopped" else EXIT_DONE

    def _train(self) -> End:
        steps, every = self.recipe.run.steps, self.recipe.checkpoint.every
        end: End = "done"
        with self._open_log() as log, self._profiler:
            self._alarms = Alarms(self.recipe.health.alarms if self.mesh.is_main else None, log.lines())
            if self.step == 0 or (self._samples is not None and self._samples.are_missing(self.step)):
                self._take_samples(log)
            while self.step < steps:
                self._profiler.before_step(self.step + 1)
                self.train_step()
                stopping, ended = self._settle()
                in_haste = stopping and self.step < steps  # who asks to stop gives little time: saving comes first
                ended |= not in_haste and self._motion_ends_it()
                if ended or not in_haste:
                    self._take_samples(log, at_once=ended)
                if self._log(log, at_once=stopping or ended) >= self.recipe.health.max_skipped:
                    end = "failing"
                    break
                if self.step % every == 0 or self.step == steps or stopping or ended:
                    self.save()
                if ended:
                    break
                if stopping and self.step < steps:
                    logger.warning("asked to stop: saved step {}, exit code {}", self.step, EXIT_PREEMPTED)
                    end = "stopped"
                    break
            self.saver.wait()
        return end

    def _settle(self) -> tuple[bool, bool]:
        """Let all ranks know what happened to some by the end of the last step. Collective.

        Returns:
            Whether somebody asked the run to stop, and whether an alarm ends it.
        """
        lost = self._batches_read.take_lost()
        stopping, alarmed, failed, num_lost = _over_ranks(
            self._stop.is_set, self._alarms.ends_run, self.saver.has_failed, lost.count
        )
        if num_lost:
            self.stream.settle(num_lost // self.mesh.layout.sequence_size, _from_all_ranks(lost.messages))
        if failed:
            self.saver.wait()  # raises, on every rank
        return bool(stopping), bool(alarmed)

    def _go_back(self) -> None:
        """To the newest checkpoint, to go on with new noise. Collective; raises as `Rollbacks.go_back`."""
        self._continue_from(self._rollbacks.go_back(self.roles, self.step))
        self.noise_seed = self._rollbacks.noise_seed
        self._skipped_in_a_row.clear()

    def _continue_from(self, found: checkpoint.Loaded) -> None:
        """Bring data and step to where the loaded checkpoint is."""
        self.stream.load_state_dict(found.meta.stream)
        self.step = found.meta.step

    def _open_log(self) -> RunLog:
        """The run's log. Collective: where W&B refuses the run, no rank trains it.

        Raises:
            UserError: see `WandbRun`; on every rank.
        """
        wandb: list[WandbRun] = []

        def begin() -> None:
            if self.mesh.is_main and self.recipe.logging.wandb:
                wandb.append(WandbRun(self.recipe))

        checkpoint.together(begin)
        return RunLog(
            self.run_dir,
            is_main=self.mesh.is_main,
            tensorboard=self.recipe.logging.tensorboard,
            first_step=self.step,
            num_steps=self.recipe.run.steps,
            wandb=next(iter(wandb), None),
        )

    def _motion_ends_it(self) -> bool:
        """Look at the generator's samples, where the recipe says so; True if they end the training. Collective."""
        if self._motion is None or self.step % self._motion.section.every:
            return False
        with self.metrics.timed("time/motion_s"):
            found, ends = self._motion.check(self.step)
        for name, value in found.items():
            self.metrics.record(name, value)
        return ends

    def _take_samples(self, log: RunLog, *, at_once: bool = False) -> None:
        """Write videos of the generator, where the recipe says so. Collective."""
        if self._samples is None or not (self._samples.is_due(self.step) or at_once):
            return
        self.before_write()  # weights and average trade places for a while
        with self.metrics.timed("time/samples_s"):
            for name, sheet in self._samples.take(self.step).items():
                log.animate(f"samples/{name}", sheet, self.step)

    def before_write(self) -> None:
        """Wait until a save in flight has copied the tensors that the optimizer is about to change."""
        if self.saver.is_staging:
            with self.metrics.timed("time/save_wait_s"):
                self.saver.wait_staged()

    def _log(self, log: RunLog, *, at_once: bool) -> int:
        """Write what was measured, where it is time to; returns the updates skipped in a row until then."""
        log.step()
        if self.step % self.recipe.run.log_every and self.step != self.recipe.run.steps and not at_once:
            return 0
        for name, value in _place(self.stream).items():
            self.metrics.record(name, value)
        self.metrics.record("data/retries", self.stream.retries - self._retries_logged, reduce="sum")
        self._retries_logged = self.stream.retries
        scalars = self.take_scalars()
        log.write(self.step, scalars | self._alarms.look(self.step, scalars))
        return self.take_longest_row()

    def close(self) -> None:
        """Let a save in flight end; stop the stream's threads; give up the run folder and the signals."""
        self.saver.close()
        self.stream.close()
        self._held.close()


def open_stream(recipe: Recipe, mesh: Mesh, index: ShardIndex) -> Stream:
    """This rank's share of the recipe's data."""
    data = recipe.data
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
        skips_are_shared=True,
        weights=data.weights,
        max_samples=data.max_samples,
        num_threads=data.threads,
        check_crc=data.crc,
        retries=data.retries,
        read_timeout_s=data.read_timeout,
        device=mesh.device,
    )


def open_index(recipe: Recipe, mesh: Mesh) -> ShardIndex:
    """The recipe's data set; the main rank makes the shards of prompts and worlds. Collective.

    Raises:
        UserError: shards are missing or do not fit, or are others on some ranks.
    """
    with _main_first(mesh):
        index = open_shards(recipe, build_model(recipe, "generator"))
    _check_equal(index)
    return index


@dataclass(frozen=True)
class _Lost:
    """Positions that the ranks of a sequence lost together, and what this rank has to say of them."""

    count: int
    messages: list[str]


class _AgreedBatches:
    """The stream's batches, valid where every rank of the sequence could read them."""

    def __init__(self, stream: Stream, mesh: Mesh) -> None:
        self._stream, self._group = stream, mesh.sequence
        self._lost_by_others = 0

    def next(self) -> Batch:
        """The next batch of this rank. Collective over the ranks of its sequence."""
        batch = self._stream.next()
        valid = agree(batch.valid, self._stream.unit, self._group)
        self._lost_by_others += int((batch.valid & ~valid).sum())
        return replace(batch, valid=valid)

    def take_lost(self) -> _Lost:
        """What was lost since the last call: the same count on all ranks of the sequence."""
        messages, others = self._stream.take_lost(), self._lost_by_others
        self._lost_by_others = 0
        return _Lost(len(messages) + others, messages)


def _over_ranks(*values: int) -> list[int]:
    """The sum of each value over all ranks. Collective."""
    sums = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(sums)
    return sums.tolist()


def _from_all_ranks(messages: list[str]) -> list[str]:
    """The messages of all ranks in the ranks' order, each once. Collective."""
    gathered: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, messages)
    return list(dict.fromkeys(message for some in gathered for message in some))


def _place(stream: Stream) -> dict[str, int]:
    """Where the stream is and what it lost, as metrics: the epoch of each entry of data.shards where they are mixed."""
    epochs = stream.epochs
    named = {"data/epoch": epochs[0]} if len(epochs) == 1 else {f"data/epoch/{e}": n for e, n in enumerate(epochs)}
    return {"data/unit": stream.unit, "data/skipped": stream.skipped, **named}


def _check_equal(index: ShardIndex) -> None:
    """Refuse a data set that is not the same on all ranks, as of copies on the nodes' own disks. Collective."""
    fingerprints: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(fingerprints, index.fingerprint)
    if others := [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]:
        raise UserError(
            f"data.shards: rank {others[0]} sees other samples than rank 0; give all nodes the same shards in the same"
            " order"
        )


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
