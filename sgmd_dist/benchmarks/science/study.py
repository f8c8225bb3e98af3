"""Trainings of several methods, worlds, learning rates and seeds, in worker processes; finished ones are kept."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import torch
from loguru import logger

from sgmd_dist.benchmarks.science.base import REFERENCE_SEED, World
from sgmd_dist.benchmarks.science.methods import DMD2, LEARNING_RATES, METHODS, SGMD
from sgmd_dist.benchmarks.science.training import Curve, Method, Point, Training
from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.registry import allowed

WORLDS = ("ring", "trajectories", "tiny_wan")
TUNING_SEED = 1000  # the first of the seeds that learning rates are chosen with; no result is read off them


@dataclass(frozen=True)
class Budget:
    """How long a training is, and how closely it is watched.

    Attributes:
        passes: network passes per sample.
        num_points: scores on the way, besides those of the start.
        num_samples, num_reference: that are scored, and of the teacher; None for the world's own numbers.
    """

    passes: float
    num_points: int
    num_samples: int | None = None
    num_reference: int | None = None


@dataclass(frozen=True)
class Job:
    """One training."""

    world: str
    method: Method
    lr: float
    seed: int
    budget: Budget

    @property
    def digest(self) -> str:
        """Of all that decides the result, short of the code."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@cache
def world_of(name: str) -> World:
    """The world `name`, one for this process."""
    return importlib.import_module(f"sgmd_dist.benchmarks.science.{name}").build()


def run_job(job: Job) -> Curve:
    """Train, on one thread."""
    torch.set_num_threads(1)
    budget = job.budget
    sizes = (budget.num_samples, budget.num_reference)
    return Training(world_of(job.world), job.method, job.lr, job.seed, *sizes).run(budget.passes, budget.num_points)


def run_jobs(jobs: Sequence[Job], workers: int, folder: Path | None) -> list[Curve]:
    """The jobs' curves in their order.

    Args:
        workers: processes, of one thread each.
        folder: where curves are kept and looked for; None keeps none.
    """
    wanted = {job.digest: job for job in jobs}
    found = {digest: curve for digest, job in wanted.items() if (curve := _kept(job, folder)) is not None}
    missing = [job for digest, job in wanted.items() if digest not in found]
    for name, count in {(job.world, job.budget.num_reference) for job in missing}:
        world = world_of(name)
        world.teacher_samples(count or world.num_reference, REFERENCE_SEED)  # once, for all workers
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "sgmd_dist.benchmarks.science.tiny_wan"])  # imported once for all workers
    with ProcessPoolExecutor(workers, context, _end_with_this_process) as pool:
        futures = {pool.submit(run_job, job): job for job in missing}
        for number, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            found[job.digest] = _keep(job, future.result(), folder)
            logger.info(f"{number} of {len(missing)}: {job.world}, {job.method.name}, lr {job.lr:g}, seed {job.seed}")
    return [found[job.digest] for job in jobs]


def _end_with_this_process() -> None:
    """Run in a worker: if the process that started it is killed, it does not train on for minutes."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _path(job: Job, folder: Path) -> Path:
    return folder / "curves" / f"{job.world}-{job.digest}.json"


def _keep(job: Job, curve: Curve, folder: Path | None) -> Curve:
    if folder is not None:
        path = _path(job, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, (json.dumps(asdict(curve)) + "\n").encode())
    return curve


def _kept(job: Job, folder: Path | None) -> Curve | None:
    if folder is None or not (path := _path(job, folder)).is_file():
        return None
    content = json.loads(path.read_bytes())
    return Curve(**content | {"points": [Point(**point) for point in content["points"]]})


@dataclass(frozen=True)
class Study:
    """Methods in one world: each with the learning rate that suits it, over several seeds.

    Attributes:
        methods: names out of `METHODS`.
        learning_rates: of the generator, to choose from; of one nothing is chosen.
        num_seeds: of the results.
        num_tuning_seeds: others, that the learning rate is chosen with.
    """

    world: str
    methods: Sequence[str]
    learning_rates: Sequence[float]
    num_seeds: int
    num_tuning_seeds: int
    budget: Budget

    def run(self, workers: int, folder: Path | None) -> dict[str, list[Curve]]:
        """Curves by method, one for each seed."""
        rates = self._tuned(workers, folder)
        seeds = range(self.num_seeds)
        jobs = [self._job(name, rates[name], seed) for name in self.methods for seed in seeds]
        curves = run_jobs(jobs, workers, folder)
        return {name: curves[i * self.num_seeds : (i + 1) * self.num_seeds] for i, name in enumerate(self.methods)}

    def _job(self, name: str, lr: float, seed: int) -> Job:
        return Job(self.world, METHODS[name], lr, seed, self.budget)

    def _tuned(self, workers: int, folder: Path | None) -> dict[str, float]:
        """The learning rate of the lowest `Curve.anytime`, by method."""
        if len(self.learning_rates) == 1:
            return dict.fromkeys(self.methods, self.learning_rates[0])
        seeds = range(TUNING_SEED, TUNING_SEED + self.num_tuning_seeds)
        tried = [(name, lr) for name in self.methods for lr in self.learning_rates]
        jobs = [self._job(name, lr, seed) for name, lr in tried for seed in seeds]
        curves = run_jobs(jobs, workers, folder)
        size = len(seeds)
        quality = {
            key: fmean(curve.anytime() for curve in curves[i * size : (i + 1) * size]) for i, key in enumerate(tried)
        }
        return {name: min(self.learning_rates, key=lambda lr: quality[name, lr]) for name in self.methods}


def full_study(world: str, num_seeds: int, methods: Sequence[str] | None = None, passes: float | None = None) -> Study:
    """All methods in a world, each at the learning rate of its grid that suits it, over 8000 network passes, in
    the tiny Wan over 2000: there a pass takes longest and the best comes soon.

    Args:
        passes: network passes per sample, instead of the world's own number, scored at the same distances.

    Raises:
        UserError: there is no such method.
    """
    names = known(methods, tuple(METHODS), "--methods")
    own, num_points, num_tuning_seeds = (2000, 10, 1) if world == "tiny_wan" else (8000, 20, 2)
    passes = passes or own
    budget = Budget(passes, max(1, round(num_points * passes / own)))
    return Study(world, names, LEARNING_RATES[world], num_seeds, num_tuning_seeds, budget)


def quick_study(world: str, num_seeds: int, methods: Sequence[str] | None = None) -> Study:
    """All methods in a world for some steps: whether everything runs, and nothing more. The tiny Wan is left to two.

    Raises:
        UserError: there is no such method.
    """
    names = known(methods, (SGMD, DMD2) if world == "tiny_wan" else tuple(METHODS), "--methods")
    budget = Budget(20, 1, 32, 64) if world == "tiny_wan" else Budget(50, 1, 256, 256)
    return Study(world, names, LEARNING_RATES[world][-2:-1], min(num_seeds, 2), 0, budget)


def known(names: Sequence[str] | None, choices: Sequence[str], option: str) -> tuple[str, ...]:
    """The names that were asked for, or all.

    Raises:
        UserError: one of them is none of the choices.
    """
    for name in names or ():
        if name not in choices:
            raise UserError(f"{option} {name!r}: no such name; {allowed(name, list(choices))}")
    return tuple(names or choices)
