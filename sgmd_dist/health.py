"""Watching a run: whether the generator's videos move as the teacher's do, and have its colours.

Loss values say little of a distillation, and its common ends show here first: videos that stand still, motion or
contrast above the teacher's, from where on they get worse (docs/science.md), and colours that drift away.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
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
from sgmd_dist.recipe import Recipe
from sgmd_dist.rng import SampleId
from sgmd_dist.roles import Roles
from sgmd_dist.rollout import guided, sample
from sgmd_dist.watch_sections import MotionSection

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


@dataclass(frozen=True)
class Look:
    """What videos look like, in numbers: their mean latent motion, and of each latent channel the mean and the standard
    deviation over all videos, frames and places."""

    motion: float
    means: list[float]
    stds: list[float]


def colour_drift(look: Look, teacher: Look) -> float:
    """How far the channel that is farthest away has drifted, in the teacher's standard deviations.

    The distance is the Wasserstein distance of the normal distributions with the channel's moments, so a shift of the
    mean and a change of contrast by one standard deviation are equally far.
    """
    distances = [
        math.hypot(mean - teacher_mean, std - teacher_std) / max(teacher_std, 1e-12)
        for mean, std, teacher_mean, teacher_std in zip(look.means, look.stds, teacher.means, teacher.stds, strict=True)
    ]
    return max(distances)


class MotionWatch:
    """Motion and colours of the generator's few-step samples against those of the guided teacher's.

    Prompts are the first of the data set and the noise is fixed, the same for both; the ranks share the samples, and
    what is found does not depend on their number. The teacher's is sampled once for a run folder.
    """

    def __init__(self, section: MotionSection, recipe: Recipe, mesh: Mesh, index: ShardIndex, roles: Roles) -> None:
        self.section = section
        self._recipe, self._mesh, self._index, self._roles = recipe, mesh, index, roles
        self._chain = few_step_chain(recipe, "health.motion")
        self._batches = list(_first_samples(section.samples, recipe, mesh, index))
        self._teacher_look: Look | None = None

    def check(self, step: int) -> tuple[dict[str, float], bool]:
        """The metrics after optimizer step number `step` (from 1), and whether they end the training. Collective.

        Warns of what is out of bounds.
        """
        self._roles.train_only(None)
        look, teacher, section = self._generator(), self._teacher(), self.section
        ratio, drift = look.motion / max(teacher.motion, 1e-12), colour_drift(look, teacher)
        faults = list(_faults(ratio, drift, section))
        remedy = "this ends the training" if section.stop else "an earlier checkpoint may be better"
        if self._mesh.is_main:
            for fault in faults:
                logger.warning("step {}: {}; {}", step, fault, remedy)
        metrics = {"health/motion_ratio": ratio, "health/colour_drift": drift}
        return metrics, section.stop and bool(faults)

    def _generator(self) -> Look:
        generator = self._roles["generator"].run
        return self._look(
            lambda batch: guided(generator, batch.condition, batch.negative_embeds, 1.0), self._chain.student_steps
        )

    def _teacher(self) -> Look:
        """The teacher's look: known, kept in the run folder, or measured now."""
        if self._teacher_look is None:
            kept = [self._kept() if self._mesh.is_main else None]
            dist.broadcast_object_list(kept)
            self._teacher_look = kept[0] if kept[0] is not None else self._measure_teacher()
        return self._teacher_look

    def _measure_teacher(self) -> Look:
        teacher, scale = self._roles["teacher"].run, self._guidance_scale
        logger.info("measuring motion and colours of the teacher's samples, once")
        look = self._look(
            lambda batch: guided(teacher, batch.condition, batch.negative_embeds, scale, self._chain.guidance),
            self.section.teacher_steps,
        )
        if self._mesh.is_main:
            self._keep(look)
        return look

    def _keep(self, teacher: Look) -> None:
        content = json.dumps({"settings": self._settings, **asdict(teacher)}, indent=1) + "\n"
        try:
            write_durably(self._path, content.encode())
        except OSError as error:
            logger.warning(
                "{}: cannot be written ({}); the teacher is measured again after a restart", self._path, error
            )

    def _look(self, velocity_of: Callable[[Batch], flow.Velocity], num_steps: int) -> Look:
        """Of the samples of all ranks. Collective."""
        num_channels = self._batches[0].latent_shape[0]
        sums = torch.zeros(2 + 2 * num_channels, dtype=torch.float64)
        for batch in self._batches:
            batch = batch.to(self._mesh.device)
            seed, shift = self._recipe.run.seed, self._chain.sigma_shift
            noise = rng.sample_normal(batch.latent_shape, seed, "health/motion", batch.ids, device=self._mesh.device)
            videos = sample(velocity_of(batch), noise, num_steps, shift)
            values = videos.double().flatten(2)  # [B, C, F H W]
            each = [torch.ones_like(batch.valid)[:, None], latent_motion(videos)[:, None]]
            each += [values.mean(dim=2), values.square().mean(dim=2)]
            numbers = torch.cat([number.double() for number in each], dim=1)  # [B, 2 + 2 C]
            sums += numbers.where(batch.valid[:, None], 0.0).sum(dim=0).cpu()
        dist.all_reduce(sums)
        motion, *moments = (sums[1:] / sums[0].clamp_min(1)).tolist()
        means, squares = moments[:num_channels], moments[num_channels:]
        stds = [math.sqrt(max(square - mean**2, 0.0)) for mean, square in zip(means, squares, strict=True)]
        return Look(motion, means, stds)

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

    def _kept(self) -> Look | None:
        """What an earlier start of the run has measured; None if there is nothing of these settings."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            return Look(**content) if content.pop("settings") == self._settings else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _faults(ratio: float, drift: float, section: MotionSection) -> Iterator[str]:
    """What is wrong with the generator's motion, over the teacher's, and with its colours: nothing, or a text each."""
    if not section.lowest <= ratio <= section.highest:
        fault = "the videos nearly stand still" if ratio < section.lowest else "motion or contrast overshoots"
        bounds = f"health.motion's {section.lowest:g} to {section.highest:g}"
        yield f"latent motion is {ratio:.2f} of the teacher's, out of {bounds}: {fault}"
    if not drift <= section.max_drift:
        yield (
            f"the values of a latent channel are {drift:.2f} of the teacher's standard deviations away from the"
            f" teacher's, beyond health.motion's {section.max_drift:g}: colours or contrast drift"
        )


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
