"""Videos of fixed prompts and seeds while a run trains.

    run.dir/samples/step-00000100/generator/      a folder of videos (sgmd_dist/video_folder.py)
    run.dir/samples/step-00000100/generator.ema/  the moving average's
    run.dir/samples/teacher/                      the guided teacher's, once

They come from the sharded networks: all ranks take part in every forward pass, the data-parallel ranks share out the
videos, and the ranks of a sequence share out the decoding of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.assemble import build_architecture, build_model
from sgmd_dist.checkpoint import together
from sgmd_dist.conditions import Condition
from sgmd_dist.data.sources import latent_shape_of
from sgmd_dist.decode import decoder
from sgmd_dist.errors import UserError, describe
from sgmd_dist.health import few_step_chain
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.prompts import Prompt, check_prompts, encode_together, encoders_of, image_parts, prompts_in
from sgmd_dist.recipe import Recipe
from sgmd_dist.roles import Roles
from sgmd_dist.rollout import guided, sample
from sgmd_dist.samples_section import SamplesSection
from sgmd_dist.sampling import noise_of
from sgmd_dist.video_folder import (
    INDEX,
    Take,
    sheet_of,
    takes_of,
    tile_of,
    write_index,
    write_sheet,
    write_take,
)

FOLDER = "samples"
GENERATOR, AVERAGE = "generator", "generator.ema"
TEACHER = "teacher"
_KEY = "samples.prompts"
Guided = Callable[[Condition], flow.Velocity]


def check(recipe: Recipe) -> None:
    """Refuse samples that cannot be taken.

    Raises:
        UserError: the objective trains no few-step generator, or prompts, their images or the text encoder are not
            there.
    """
    if recipe.samples is not None:
        few_step_chain(recipe, "samples")
        model = build_architecture(recipe, "generator")
        image_parts(encoders_of(recipe, model, _KEY), _KEY)
        check_prompts(prompts_of(recipe.samples), model, _KEY)


def prompts_of(section: SamplesSection) -> list[Prompt]:
    """The prompts of `samples.prompts`.

    Raises:
        UserError: the file is missing, unreadable or empty.
    """
    prompts = section.prompts
    if isinstance(prompts, str):
        return prompts_in(prompts, f"{_KEY} = '{prompts}'")
    return [Prompt(caption) for caption in prompts]


class TrainingSamples:
    """Takes the videos that the recipe's `samples` asks for. Made, and called, on all ranks alike."""

    def __init__(self, section: SamplesSection, recipe: Recipe, mesh: Mesh, roles: Roles) -> None:
        self._section, self._recipe, self._mesh, self._roles = section, recipe, mesh, roles
        self._chain = few_step_chain(recipe, "samples")
        model = build_model(recipe, "generator")
        encoders = encoders_of(recipe, model, _KEY)
        self._prompts = encode_together(encoders, lambda: prompts_of(section), mesh.device, _KEY)
        self._latent_shape = latent_shape_of(recipe, model)
        self._takes = takes_of(self._prompts.captions, section.seeds)
        self._waits_for_teacher = section.teacher

    def is_due(self, step: int) -> bool:
        """Whether videos are to be taken after optimizer step number `step` (0: before the first)."""
        return step % self._section.every == 0 or step == self._recipe.run.steps

    def are_missing(self, step: int) -> bool:
        """Whether the videos of `step` are due and not there: a run that is asked to stop takes none. Collective."""
        if not self.is_due(step):
            return False
        place = self._place(step)
        kept = [
            self._mesh.is_main
            and all(_holds(place / which, self._takes, self._facts(step, which)) for which in self._networks)
        ]
        dist.broadcast_object_list(kept)
        return not kept[0]

    def take(self, step: int) -> dict[str, bytes]:
        """Write the videos of `step`; returns a sheet of each folder as gif, nothing on other ranks than the main one.

        Nobody may write or copy the generator's weights and average meanwhile. Collective.
        """
        self._roles.train_only(None)
        sheets = self._teacher() if self._waits_for_teacher else {}
        self._waits_for_teacher = False
        for which in self._networks:
            with self._roles["generator"].averaged() if which == AVERAGE else nullcontext():
                sheets[which] = self._generator(step, which)
        return {name: sheet for name, sheet in sheets.items() if sheet is not None}

    def _generator(self, step: int, which: str) -> bytes | None:
        network, negative = self._roles["generator"].run, self._prompts.negative
        facts = self._facts(step, which)
        latents = self.latents(lambda condition: guided(network, condition, negative, 1.0), facts)
        return self._write(self._place(step) / which, facts, latents)

    def _facts(self, step: int, which: str) -> dict[str, Any]:
        """What videos.json says of the generator's videos."""
        return {
            "run": self._recipe.run.name,
            "step": step,
            "weights": which,
            "steps": self._chain.student_steps,
            "shift": self._chain.sigma_shift,
            "guidance_scale": 1.0,
            **self._prompts.facts,
        }

    def _teacher(self) -> dict[str, bytes | None]:
        """The teacher's videos, where the folder does not hold them yet."""
        folder, network = self._folder / TEACHER, self._roles["teacher"].run
        facts = {
            "weights": TEACHER,
            "pretrained": self._recipe.model.for_role("teacher").pretrained,
            "steps": self._section.teacher_steps,
            "shift": self._chain.sigma_shift,
            "guidance_scale": self._chain.guidance_scale.at(self._recipe.run.steps),
            **self._prompts.facts,
        }
        kept = [_holds(folder, self._takes, facts) if self._mesh.is_main else False]
        dist.broadcast_object_list(kept)
        if kept[0]:
            return {}
        logger.info("sampling the teacher, once")
        negative, scale = self._prompts.negative.to(self._mesh.device), facts["guidance_scale"]
        mode = self._chain.guidance
        latents = self.latents(lambda condition: guided(network, condition, negative, scale, mode), facts)
        return {TEACHER: self._write(folder, facts, latents)}

    def latents(self, velocity_of: Guided, facts: Mapping[str, Any]) -> dict[Take, Tensor]:
        """This data-parallel rank's share of the videos, each `[C, F, H, W]` float32 on the CPU. Collective.

        All ranks run equally many passes: one without a video of its own left repeats the last.
        """
        mesh, micro = self._mesh, self._recipe.data.micro_batch_size
        last, found = len(self._takes) - 1, {}
        for first in range(0, len(self._takes), micro * mesh.dp_size):
            places = range(first + mesh.dp_rank * micro, first + (mesh.dp_rank + 1) * micro)
            takes = [self._takes[min(place, last)] for place in places]
            noise = torch.stack([noise_of(self._latent_shape, take.seed, take.number) for take in takes])
            condition = self._prompts.condition([take.number for take in takes], mesh.device)
            videos = sample(velocity_of(condition), noise.to(mesh.device), facts["steps"], facts["shift"]).cpu()
            found |= {take: video for place, take, video in zip(places, takes, videos, strict=True) if place <= last}
        return found

    def _write(self, folder: Path, facts: Mapping[str, Any], latents: Mapping[Take, Tensor]) -> bytes | None:
        """Decode and write the videos; the main rank adds index and sheet, which it returns. Collective."""
        size = self._mesh.layout.sequence_size
        mine = [*latents][self._mesh.rank % size :: size]
        parts = together(lambda: self._write_own(folder, {take: latents[take] for take in mine}))
        if not self._mesh.is_main:
            return None
        tiles = {take: tile for part in parts for take, tile in part.items()}
        if len(tiles) < len(self._takes):
            return None
        with _warning_of_files():
            write_index(folder, self._takes, self._section.formats, facts)
            write_sheet(folder / "sheet.gif", sheet_of(self._takes, tiles))
            return (folder / "sheet.gif").read_bytes()
        return None

    def _write_own(self, folder: Path, latents: Mapping[Take, Tensor]) -> dict[Take, Tensor]:
        """Decode and write this rank's videos; returns the tiles of those that are written."""
        tiles: dict[Take, Tensor] = {}
        device = self._mesh.device
        try:
            with _warning_of_files():  # of the VAE too
                self._decode(folder, latents, tiles)
        except RuntimeError as error:  # out of memory, which cuDNN says in words of its own
            logger.warning("samples: cannot be decoded on {} beside the training ({})", device, describe(error))
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return tiles

    def _decode(self, folder: Path, latents: Mapping[Take, Tensor], tiles: dict[Take, Tensor]) -> None:
        """Write videos and add their tiles, with a VAE that is in memory for as long as this takes."""
        if not latents:
            return
        pretrained = self._recipe.model.pretrained
        to_rgb = decoder(None if pretrained is None else Path(pretrained), self._mesh.device)
        for take, video in latents.items():
            rgb = to_rgb(video)
            write_take(folder, take, rgb, self._section.formats, self._section.frames_per_second)
            tiles[take] = tile_of(rgb)

    @property
    def _networks(self) -> tuple[str, ...]:
        """Whose videos are taken, beside the teacher's."""
        return (GENERATOR, AVERAGE) if self._section.ema else (GENERATOR,)

    @property
    def _folder(self) -> Path:
        return Path(self._recipe.run.dir) / FOLDER

    def _place(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"


@contextmanager
def _warning_of_files() -> Iterator[None]:
    """Training goes on where a VAE cannot be read or a video not written."""
    try:
        yield
    except UserError as error:
        logger.warning("samples: {}", error)


def _holds(folder: Path, takes: Sequence[Take], facts: Mapping[str, Any]) -> bool:
    """Whether the folder's videos are these."""
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        prompts = [(video["prompt_number"], video["prompt"], video["seed"]) for video in content.pop("videos")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return content == dict(facts) and prompts == [(take.number, take.caption, take.seed) for take in takes]
