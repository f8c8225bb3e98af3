"""The moving-shapes world: synthetic videos with captions whose distribution is known exactly.

A video shows one anti-aliased shape of one colour on a torus (what leaves on the right comes back on the left),
moving with constant velocity along one direction. The caption names shape, colour and direction; the start
position and the SPEED are not in it. A generator that averages over what the prompt leaves open therefore shows
too little motion, and can be caught: the torus makes position a phase, so that speed is measurable to a fraction
of a pixel at any place. The latents are the video itself, there is no VAE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgmd_dist import rng
from sgmd_dist.data.encode import NEGATIVE_PROMPT, TextEncoder
from sgmd_dist.data.format import write_negative_prompt
from sgmd_dist.data.index import consolidate
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.errors import UserError

SOURCE = "world:moving_shapes"
AMPLITUDE = 4.7  # of a fully covered pixel; a shape covers an eighth of the frame, so latents have a std of about 1
EDGE_WIDTH = 0.6  # pixels: logistic edge, soft enough that half-pixel moves change no shape


def _ball(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    return np.hypot(dx, dy) - 2.4


def _box(dx: np.ndarray, dy: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(dx) - half_width, np.abs(dy) - half_height)


# Signed distance in pixels (negative inside) from offsets to the centre; rows grow downwards.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ball": _ball,
    "bar": lambda dx, dy: _box(dx, dy, half_width=3.4, half_height=1.3),
    "pillar": lambda dx, dy: _box(dx, dy, half_width=1.3, half_height=3.4),
}
# Channels are red, green, blue around mid-grey. They sum to zero, so that latents have mean 0.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, -0.6, -0.3),
    "green": (-0.9, 0.8, -0.3),
    "blue": (-0.8, -0.6, 1.2),
    "yellow": (0.7, 0.4, -0.6),
}
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}  # (x, y)


@dataclass(frozen=True)
class WorldSample:
    """One video of the world.

    Attributes:
        latents: `[C, F, H, W]` float32.
        caption: "a {colour} {shape} moving {direction}".
        speed: pixels per frame; not in the caption.
    """

    latents: Tensor
    caption: str
    shape: str
    colour: str
    direction: str
    speed: float


@dataclass(frozen=True)
class World:
    """The distribution: attributes are drawn independently and uniformly from the lists, positions from the torus.

    Attributes:
        num_frames, height, width: size of a video in frames and pixels.
        channels: 3 (red, green, blue).
        shapes, colours, directions: names out of SHAPES, COLOURS, DIRECTIONS. By default 32 captions, which a teacher
            of half a million parameters learns well in minutes.
        speeds: pixels per frame, below half of the smaller side (beyond it a move looks like its opposite).
    """

    num_frames: int = 8
    height: int = 12
    width: int = 12
    channels: int = 3
    shapes: tuple[str, ...] = ("ball", "bar")
    colours: tuple[str, ...] = tuple(COLOURS)
    directions: tuple[str, ...] = tuple(DIRECTIONS)
    speeds: tuple[float, ...] = (0.5, 1.0, 1.5)

    def __post_init__(self) -> None:
        for name, allowed in (("shapes", SHAPES), ("colours", COLOURS), ("directions", DIRECTIONS)):
            values = getattr(self, name)
            unknown = [value for value in values if value not in allowed]
            if unknown or not values:
                raise UserError(f"world: {name}={list(values)}: expected some of {sorted(allowed)}; remove {unknown}")
        if self.channels != 3:
            raise UserError(f"world: channels={self.channels}: the world's latents are red, green, blue; use 3")
        if self.num_frames < 2:
            raise UserError(f"world: num_frames={self.num_frames}: a move needs at least 2 frames")
        limit = min(self.height, self.width) / 2
        if not self.speeds or not all(0 <= speed < limit for speed in self.speeds):
            raise UserError(
                f"world: speeds={list(self.speeds)}: expected pixels per frame in [0, {limit:g}), "
                f"half of the smaller side of {self.height}x{self.width}; lower them or enlarge the video"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W)."""
        return (self.channels, self.num_frames, self.height, self.width)

    @property
    def mean_speed(self) -> float:
        """Expected speed in pixels per frame: what a generator that loses nothing shows on average."""
        return sum(self.speeds) / len(self.speeds)

    def captions(self) -> list[str]:
        """Every caption of the world, in a fixed order."""
        return [
            caption_of(shape, colour, direction)
            for shape in self.shapes
            for colour in self.colours
            for direction in self.directions
        ]

    def sample(self, seed: int, index: int) -> WorldSample:
        """The video number `index` of the endless data set `seed`: a pure function of both."""
        shape = self.shapes[rng.integer(len(self.shapes), seed, "world/shape", index)]
        colour = self.colours[rng.integer(len(self.colours), seed, "world/colour", index)]
        direction = self.directions[rng.integer(len(self.directions), seed, "world/direction", index)]
        speed = self.speeds[rng.integer(len(self.speeds), seed, "world/speed", index)]
        start_x = rng.uniform(seed, "world/x", index) * self.width
        start_y = rng.uniform(seed, "world/y", index) * self.height
        latents = self.render(shape, colour, direction, speed, start_x, start_y)
        return WorldSample(latents, caption_of(shape, colour, direction), shape, colour, direction, speed)

    def render(self, shape: str, colour: str, direction: str, speed: float, start_x: float, start_y: float) -> Tensor:
        """The video `[C, F, H, W]`, float32, of a shape whose centre starts at (start_x, start_y), in pixels."""
        frames = np.arange(self.num_frames, dtype=np.float64)[:, None, None]
        step_x, step_y = DIRECTIONS[direction]
        dx = _wrap(np.arange(self.width)[None, None, :] - start_x - step_x * speed * frames, self.width)
        dy = _wrap(np.arange(self.height)[None, :, None] - start_y - step_y * speed * frames, self.height)
        distance = SHAPES[shape](*np.broadcast_arrays(dx, dy))
        coverage = 1.0 / (1.0 + np.exp(distance / EDGE_WIDTH))
        colours = AMPLITUDE * np.asarray(COLOURS[colour])
        return torch.from_numpy((colours[:, None, None, None] * coverage).astype(np.float32))


def all_captions() -> list[str]:
    """The captions of a world with every shape, colour and direction: all words that a text encoder must know."""
    return World(shapes=tuple(SHAPES), colours=tuple(COLOURS), directions=tuple(DIRECTIONS)).captions()


def caption_of(shape: str, colour: str, direction: str) -> str:
    """The caption of a video."""
    return f"a {colour} {shape} moving {direction}"


def _wrap(offset: np.ndarray, size: int) -> np.ndarray:
    """Offsets on a circle of `size` pixels, brought into [-size/2, size/2)."""
    return np.mod(offset + size / 2, size) - size / 2


def latents_to_rgb(latents: Tensor, scale: int = 1) -> Tensor:
    """Pictures of world latents: `[C, F, H, W]` float -> `[F, scale H, scale W, 3]` uint8, every pixel repeated."""
    unit = (0.5 + latents.float() / (2 * AMPLITUDE)).clamp(0, 1)
    rgb = (unit * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
    return rgb.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2).contiguous()


def write_world_shards(
    folder: str | Path,
    world: World,
    text_encoder: TextEncoder,
    *,
    num_samples: int,
    seed: int,
    samples_per_shard: int = 1024,
) -> None:
    """Write samples 0 ... num_samples - 1 of `world` as a complete data set folder with its negative prompt.

    The json of a sample carries, beside the format's fields, shape, colour, direction and speed.
    """
    if num_samples < 1:
        raise UserError(f"world: num_samples={num_samples}: expected at least 1")
    captions = world.captions()
    embeds = dict(zip(captions, (e.bfloat16() for e in text_encoder.encode(captions)), strict=True))
    digits = max(6, math.ceil(math.log10(num_samples + 1)))
    bucket = "x".join(map(str, world.latent_shape))
    with ShardWriter(
        Path(folder), latent_shape=world.latent_shape, bucket=bucket, samples_per_shard=samples_per_shard
    ) as writer:
        for index in range(num_samples):
            sample = world.sample(seed, index)
            writer.add(
                f"{index:0{digits}d}",
                embeds[sample.caption],
                sample.caption,
                latents=sample.latents.bfloat16(),
                source=SOURCE,
                shape=sample.shape,
                colour=sample.colour,
                direction=sample.direction,
                speed=sample.speed,
            )
    write_negative_prompt(Path(folder), text_encoder.encode([NEGATIVE_PROMPT])[0].bfloat16())
    consolidate(Path(folder))
