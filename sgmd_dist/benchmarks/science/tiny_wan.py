"""The moving-shapes world with the tiny Wan of recipes/tiny_wan as the teacher.

The caption leaves position and speed open. The teacher's samples are made once and kept in `CACHE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sgmd_dist.batch import Batch, padded
from sgmd_dist.benchmarks.science.base import REFERENCE_SEED
from sgmd_dist.benchmarks.science.scores import root_mean_square, wasserstein_1d
from sgmd_dist.conditions import Condition
from sgmd_dist.data.digest import content_digest
from sgmd_dist.data.encode import NEGATIVE_PROMPT, TextEncoder
from sgmd_dist.data.world import World as MovingShapes
from sgmd_dist.distances import energy_distance, mean_distance, sliced_wasserstein
from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.models import wan
from sgmd_dist.models.base import LatentShape, RunnableModel, VideoModel
from sgmd_dist.motion import jitter, latent_motion, place, speed
from sgmd_dist.prompts import Prompts
from sgmd_dist.rng import SampleId
from sgmd_dist.sampling import sample_videos

FOLDER = Path("recipes/tiny_wan")
CACHE = Path("runs/science")
_TEXT_TOKENS = 8
_TEACHER_STEPS = 30
_FAST = 1.25  # pixels per frame: between the world's second and its fastest speed
_SUBPIXELS = 4  # places of a shape per pixel and axis that a frame is held against
_NUM_SPLITS = 4


def build() -> TinyWan:
    """The world; its folder is looked for in the working directory.

    Raises:
        UserError: the folder is not there.
    """
    if not FOLDER.is_dir():
        raise UserError(f"{FOLDER}: not found; run the benchmark from the root of the repository")
    return TinyWan()


@dataclass(frozen=True)
class _Floor:
    """How far teacher samples are from others, centred; `mean_distance`: between two of the reference."""

    swd: float
    energy_distance: float
    mean_distance: float


class TinyWan:
    """A learned teacher of half a million parameters; see `base.World`."""

    name = "tiny_wan"
    batch_size = 8
    guidance_scale = 3.0
    sigma_shift = 5.0
    num_samples = 256
    num_reference = 1024

    def __init__(self) -> None:
        self.world = MovingShapes()
        self.latent_shape: LatentShape = self.world.latent_shape
        self._floors: dict[tuple[int, int], _Floor] = {}
        self.model: VideoModel = wan.build(
            wan.Section(compute_dtype="float32", text_tokens=_TEXT_TOKENS, boundary_ratio=None), str(FOLDER), "FOLDER"
        )

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return self.model.read_export(FOLDER / "transformer")

    @cached_property
    def _embeds(self) -> dict[str, Tensor]:
        """Padded prompt embeddings `[T, D]` by caption, rounded as shards hold them."""
        captions = [*self.world.captions(), NEGATIVE_PROMPT]
        embeds = TextEncoder.from_pretrained(FOLDER).encode(captions)
        return {c: padded(e.bfloat16().float(), _TEXT_TOKENS) for c, e in zip(captions, embeds, strict=True)}

    def networks(self) -> dict[str, tuple[nn.Module, RunnableModel]]:
        return {role: (self._network(), self.model) for role in ("teacher", "generator", "fake_score")}

    def _network(self) -> nn.Module:
        module = self.model.build()
        module.load_state_dict(self._weights)
        return module

    def batch(self, unit: int) -> Batch:
        numbers = range(unit * self.batch_size, (unit + 1) * self.batch_size)
        samples = [self.world.sample(0, number) for number in numbers]
        return Batch(
            ids=[SampleId(0, unit, i) for i in range(self.batch_size)],
            keys=[str(number) for number in numbers],
            latent_shape=self.latent_shape,
            prompt_embeds=torch.stack([self._embeds[sample.caption] for sample in samples]),
            negative_embeds=self._embeds[NEGATIVE_PROMPT][None],
            latents=torch.stack([sample.latents for sample in samples]),
            valid=torch.ones(self.batch_size, dtype=torch.bool),
        )

    def _captions(self, count: int) -> list[str]:
        captions = self.world.captions()
        return [captions[number % len(captions)] for number in range(count)]

    def prompts(self, count: int) -> tuple[Tensor, Tensor]:
        embeds = torch.stack([self._embeds[caption] for caption in self._captions(count)])
        return embeds, self._embeds[NEGATIVE_PROMPT][None]

    def teacher_samples(self, count: int, seed: int) -> Tensor:
        weights = content_digest([FOLDER])[:12]
        settings = f"{weights}-{self.guidance_scale:g}-{self.sigma_shift:g}-{_TEACHER_STEPS}-{count}-{seed}"
        path = CACHE / f"{self.name}-{settings}.safetensors"
        if not path.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            write_durably(path, save({"latents": self._sample_teacher(count, seed)}))
        return load_file(path)["latents"]

    def _sample_teacher(self, count: int, seed: int) -> Tensor:
        module = self._network()

        def network(x: Tensor, sigma: Tensor, condition: Condition, level: float) -> Tensor:
            return self.model.velocity(module, x, sigma, condition, level)

        prompts = Prompts(self._captions(count), *self.prompts(count))
        settings = {"num_steps": _TEACHER_STEPS, "shift": self.sigma_shift, "guidance_scale": self.guidance_scale}
        return sample_videos(network, prompts, self.latent_shape, seed=seed, **settings)

    def score(self, samples: Tensor, reference: Tensor) -> dict[str, float]:
        """Scores of samples for `prompts(N)` against the guided teacher's, `[N, C, F, H, W]` both.

        swd, energy_distance: of the centred videos, above the distance of teacher samples (of swd the root of the
        difference of squares), as a few hundred videos are far from others of their own distribution. Neither sees
        whether a video is its prompt's; shape_error does. motion_ratio, speed_ratio, jitter_ratio: means over the
        reference's. speed_distance: 1-Wasserstein distance of the speeds, in pixels per frame. fast_ratio: share of
        videos of the fastest mode over the reference's.
        """
        speeds, wanted = speed(samples), speed(reference)
        floor = self._floor(len(samples), len(reference))
        sets = centred(samples).flatten(1), centred(reference).flatten(1)
        return {
            "swd": max(sliced_wasserstein(*sets) ** 2 - floor.swd**2, 0.0) ** 0.5,
            "energy_distance": energy_distance(*sets, floor.mean_distance) - floor.energy_distance,
            "motion_ratio": float(latent_motion(samples).mean() / latent_motion(reference).mean()),
            "speed_ratio": float(speeds.mean() / wanted.mean()),
            "speed_distance": wasserstein_1d(speeds, wanted),
            "fast_ratio": float((speeds > _FAST).double().mean() / (wanted > _FAST).double().mean()),
            "jitter_ratio": float(jitter(samples).mean() / jitter(reference).mean()),
            "shape_error": float(shape_error(samples, self._captions(len(samples))).mean()),
        }

    def _floor(self, count: int, num_reference: int) -> _Floor:
        """The distances of `count` teacher samples to `num_reference` others.

        Measured between parts of the reference, every caption equally often in each. The square of swd, and the
        energy distance, which is below 0 because captions take turns, are sums of both sets' parts, inverse to their
        sizes.
        """
        if (count, num_reference) not in self._floors:
            pool = centred(self.teacher_samples(num_reference, REFERENCE_SEED)).flatten(1)
            distances, energies = [], []
            for begin in range(0, num_reference - count + 1, count)[:_NUM_SPLITS]:
                part, rest = pool[begin : begin + count], torch.cat([pool[:begin], pool[begin + count :]])
                distances.append(sliced_wasserstein(part, rest))
                energies.append(energy_distance(part, rest))
            scale = (1 / count + 1 / num_reference) / (1 / count + 1 / (num_reference - count))
            floor = _Floor(root_mean_square(distances) * scale**0.5, fmean(energies) * scale, mean_distance(pool))
            self._floors[count, num_reference] = floor
        return self._floors[count, num_reference]


def centred(latents: Tensor) -> Tensor:
    """Videos `[N, C, F, H, W]` shifted by whole pixels on the torus: the first frame's thing is in the corner.

    Where it is is uniform and says nothing, and would make any few hundred videos look far from others.
    """
    places = place(latents[:, :, 0]).round().long()
    return torch.stack([video.roll((-y, -x), (2, 3)) for video, (x, y) in zip(latents, places.tolist(), strict=True)])


def shape_error(samples: Tensor, captions: list[str]) -> Tensor:
    """How far each frame is from the nearest picture of the caption's shape and colour, over that picture's energy.

    Args:
        samples: `[N, 3, F, H, W]`.
        captions: "a {colour} {shape} moving {direction}", N of them.

    Returns:
        The mean over a video's frames `[N]`, float64; 0 for the world's own videos, up to a part of a pixel.
    """
    errors = []
    for video, caption in zip(samples.double(), captions, strict=True):
        _, colour, shape, *_ = caption.split()
        templates = _templates(shape, colour, video.shape[2], video.shape[3])  # [S, 3, H, W]
        spectra = torch.fft.fft2(video.transpose(0, 1))[:, None] * torch.fft.fft2(templates).conj()  # [F, S, 3, H, W]
        likeness = torch.fft.ifft2(spectra).real.sum(dim=2).flatten(1).max(dim=1).values
        energy = templates.square().flatten(1).sum(dim=1).mean()
        errors.append((video.square().sum(dim=(0, 2, 3)) - 2 * likeness + energy).mean() / energy)
    return torch.stack(errors)


@cache
def _templates(shape: str, colour: str, height: int, width: int) -> Tensor:
    """The shape at the parts of a pixel `[S, 3, H, W]`; whole pixels are shifts."""
    world = MovingShapes(num_frames=2, height=height, width=width)
    parts = [i / _SUBPIXELS for i in range(_SUBPIXELS)]
    places = [(x, y) for x in parts for y in parts]
    return torch.stack([world.render(shape, colour, "right", 0.0, x, y)[:, 0] for x, y in places]).double()
