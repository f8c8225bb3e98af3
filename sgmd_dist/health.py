"""Watching a run: whether the generator's videos move as the teacher's do.

Loss values say little of a distillation, and its two common ends show here first: videos that stand still, and motion
or contrast above the teacher's, from where on they get worse (docs/science.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from loguru import logger

from sgmd_dist import flow, rng
from sgmd_dist.batch import Batch
from sgmd_dist.data.evaluation_pass import evaluation_pass
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.motion import latent_motion
from sgmd_dist.objectives._distillation import DistillationSection
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.recipe import MotionSection, Recipe
from sgmd_dist.rng import SampleId
from sgmd_dist.roles import Roles
from sgmd_dist.rollout import guided, sample

TEACHER_FILE = "teacher_motion.json"


def check(recipe: Recipe) -> None:
    """Refuse what cannot be watched.

    Raises:
        UserError: `health.motion` is set, and the objective trains no few-step generator; a rank could wait for data
            longer than the others wait for it.
    """
    patience, read_timeout = recipe.health.timeout, recipe.data.read_timeout
    if read_timeout >= patience:
        raise UserError(
            f"data.read_timeout = {read_timeout:g} s, health.timeout = {patience:g} s: a rank that waits for data must"
            " give up before the others give it up; lower data.read_timeout or raise health.timeout"
        )
    if recipe.health.motion is not None:
        few_step_chain(recipe, "health.motion")


def few_step_chain(recipe: Recipe, key: str) -> DistillationSection:
    """The objective's section, which has the generator's few-step chain and the teacher's guidance.

    Raises:
        UserError: the objective trains no few-step generator, which `key` asks for.
    """
    section = recipe.objective
    if not isinstance(section, DistillationSection):
        raise UserError(f"{key}: objective.name = {section.name} trains no few-step generator to sample; remove {key}")
    return section


class MotionWatch:
    """The latent motion of the generator's few-step samples over that of the guided teacher's.

    Prompts are the first of the data set and the noise is fixed, the same for both; the ranks share the samples, and
    the ratio does not depend on their number. The teacher's is sampled once for a run folder.
    """

    def __init__(self, section: MotionSection, recipe: Recipe, mesh: Mesh, index: ShardIndex, roles: Roles) -> None:
        self.section = section
        self._recipe, self._mesh, self._index, self._roles = recipe, mesh, index, roles
        self._chain = few_step_chain(recipe, "health.motion")
        self._batches = list(_first_samples(section.samples, recipe, mesh, index))
        self._teacher_motion: float | None = None

    def check(self, step: int) -> tuple[float, bool]:
        """The ratio after optimizer step number `step` (from 1), and whether it ends the training. Collective.

        Warns where the ratio is out of bounds.
        """
        self._roles.train_only(None)
        ratio = self._generator() / max(self._teacher(), 1e-12)
        section = self.section
        if section.lowest <= ratio <= section.highest:
            return ratio, False
        fault = "the videos nearly stand still" if ratio < section.lowest else "motion or contrast overshoots"
        remedy = "this ends the training" if section.stop else "an earlier checkpoint may be better"
        if self._mesh.is_main:
            logger.warning(
                "step {}: latent motion is {:.2f} of the teacher's, out of health.motion's {:g} to {:g}: {}; {}",
                *(step, ratio, section.lowest, section.highest, fault, remedy),
            )
        return ratio, section.stop

    def _generator(self) -> float:
        generator = self._roles["generator"].run
        return self._motion(
            lambda batch: guided(generator, batch.prompt_embeds, batch.negative_embeds, 1.0), self._chain.student_steps
        )

    def _teacher(self) -> float:
        """The teacher's motion: known, kept in the run folder, or measured now."""
        if self._teacher_motion is None:
            kept = [self._kept() if self._mesh.is_main else None]
            dist.broadcast_object_list(kept)
            self._teacher_motion = kept[0] if kept[0] is not None else self._measure_teacher()
        return self._teacher_motion

    def _measure_teacher(self) -> float:
        teacher, scale = self._roles["teacher"].run, self._guidance_scale
        logger.info("measuring the motion of the teacher's samples, once")
        motion = self._motion(
            lambda batch: guided(teacher, batch.prompt_embeds, batch.negative_embeds, scale, self._chain.guidance),
            self.section.teacher_steps,
        )
        if self._mesh.is_main:
            content = {"settings": self._settings, "motion": motion}
            write_durably(self._path, (json.dumps(content, indent=1) + "\n").encode())
        return motion

    def _motion(self, velocity_of: Callable[[Batch], flow.Velocity], num_steps: int) -> float:
        """Mean latent motion over the samples of all ranks. Collective."""
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self._batches:
            batch = batch.to(self._mesh.device)
            seed, shift = self._recipe.run.seed, self._chain.sigma_shift
            noise = rng.sample_normal(batch.latent_shape, seed, "health/motion", batch.ids, device=self._mesh.device)
            motion = latent_motion(sample(velocity_of(batch), noise, num_steps, shift)).where(batch.valid, 0.0)
            sums += torch.stack([motion.double().sum(), batch.valid.double().sum()]).cpu()
        dist.all_reduce(sums)
        return float(sums[0] / sums[1].clamp_min(1))

    @property
    def _guidance_scale(self) -> float:
        return self._chain.guidance_scale.at(self._recipe.run.steps)

    @property
    def _path(self) -> Path:
        return Path(self._recipe.run.dir) / TEACHER_FILE

    @property
    def _settings(self) -> dict[str, object]:
        """Of all that the teacher's samples depend on, short of the bytes of its weights."""
        recipe = self._recipe
        return {
            "shards_sha256": self._index.fingerprint,
            "teacher": recipe.model.for_role("teacher").model_dump(mode="json"),
            "samples": self.section.samples,
            "teacher_steps": self.section.teacher_steps,
            "guidance_scale": self._guidance_scale,
            "sigma_shift": self._chain.sigma_shift,
            "seed": recipe.run.seed,
        }

    def _kept(self) -> float | None:
        """The motion that an earlier start of the run has measured; None if there is none of these settings."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            return float(content["motion"]) if content["settings"] == self._settings else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _first_samples(count: int, recipe: Recipe, mesh: Mesh, index: ShardIndex) -> Iterator[Batch]:
    """This rank's batches of the data set's first `count` samples of one latent shape, without latents.

    All ranks get equally many; a sample's id is its place, whatever the micro-batches and ranks.
    """
    _, sizes = np.unique(index.bucket, return_counts=True)
    micro = recipe.data.micro_batch_size
    rounds = math.ceil(min(count, int(sizes[0])) / (micro * mesh.dp_size))
    batches = evaluation_pass(
        index,
        micro_batch_size=micro,
        text_tokens=recipe.model.text_tokens,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        on_error=recipe.data.on_error,
        check_crc=recipe.data.crc,
    )
    with closing(batches):
        for batch in islice(batches, rounds):
            places = [id.unit * micro + id.index for id in batch.ids]
            yield replace(
                batch,
                ids=[SampleId(0, 0, place) for place in places],
                latents=None,
                noise=None,
                valid=batch.valid & torch.tensor([place < count for place in places]),
            )
