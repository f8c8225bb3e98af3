"""Scores of generated latents against reference latents, and pictures of both. Latents are `[N, C, F, H, W]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sgmd_dist.consistency import frame_colour_drift, frame_consistency
from sgmd_dist.distances import energy_distance, sliced_wasserstein
from sgmd_dist.motion import jitter, latent_motion, speed

ToRgb = Callable[[Tensor], Tensor]  # latents [C, F, H, W] -> uint8 [F, H', W', 3]

_AT_A_TIME = 8  # videos: in Fourier space, in float64, they take eight times their room
_TITLE_HEIGHT = 16
_GAP = 4
_BACKGROUND = (24, 24, 28)
_INK = (235, 235, 235)


@dataclass(frozen=True)
class Scores:
    """What `score` returns; None without real videos, and for energies of single videos.

    Attributes:
        swd: sliced Wasserstein distance to the reference; lower is better, 0 for equal sets. Two different sets of
            one distribution keep a floor that shrinks with their size: quote the reference's own beside it.
        motion_ratio: mean `latent_motion` over the reference's; 1 is best. Blur and standing still lower it,
            oversharp pictures and flicker raise it, so read it beside the other columns.
        speed_ratio: mean `speed` over the reference's; 1 is best. It sees displacement alone.
        jitter: mean temporal inconsistency (see `motion.jitter`); lower is better, 0 for a rigid constant move.
        consistency: mean cosine similarity of neighbouring frames; the reference's is best.
        frame_colour_drift: mean change of the mean colour from the first to the last frame; the reference's is best.
        energy: squared energy distance to the reference per root of a latent's number of elements; lower is better.
            Unbiased: two sets of one distribution have the mean 0, and single values may be negative.
        swd_real, energy_real: `swd` and `energy` to real videos instead of the reference.
    """

    swd: float
    motion_ratio: float
    speed_ratio: float
    jitter: float
    consistency: float
    frame_colour_drift: float
    energy: float | None = None
    swd_real: float | None = None
    energy_real: float | None = None

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def score(
    samples: Tensor, reference: Tensor, real: Tensor | None = None, *, num_projections: int = 256, seed: int = 0
) -> Scores:
    """Scores of `samples` against `reference` and `real`, all `[N, C, F, H, W]` of any N, preferably for the same
    prompts."""

    def mean(measure: Callable[[Tensor], Tensor], latents: Tensor) -> float:
        return float(torch.cat([measure(part) for part in latents.split(_AT_A_TIME)]).mean())

    def swd(others: Tensor) -> float:
        return sliced_wasserstein(samples, others, num_projections, seed)

    def energy(others: Tensor) -> float | None:
        if min(len(samples), len(others)) < 2:
            return None
        return energy_distance(samples.flatten(1), others.flatten(1)) / samples[0].numel() ** 0.5

    return Scores(
        swd=swd(reference),
        motion_ratio=mean(latent_motion, samples) / max(mean(latent_motion, reference), 1e-12),
        speed_ratio=mean(speed, samples) / max(mean(speed, reference), 1e-12),
        jitter=mean(jitter, samples),
        consistency=mean(frame_consistency, samples),
        frame_colour_drift=mean(frame_colour_drift, samples),
        energy=energy(reference),
        swd_real=None if real is None else swd(real),
        energy_real=None if real is None else energy(real),
    )


def contact_sheet(
    columns: Mapping[str, Sequence[Tensor]],
    to_rgb: ToRgb,
    *,
    prompts: Sequence[str] = (),
    tile_width: int = 120,
    smooth: bool = True,
) -> list[Image.Image]:
    """The frames of a picture of videos: one row per video, one column per key of `columns` under its title.

    Args:
        columns: title -> latents `[N, C, F, H, W]`, the same N and F everywhere; row i shows every column's video i.
        to_rgb: latents `[C, F, H, W]` -> pictures uint8 `[F, H', W', 3]`.
        prompts: written above the rows, where given, cut where they are longer than a row.
        tile_width: pixels of a video's width in the picture; the height follows.
        smooth: bicubic enlargement instead of visible pixels.
    """
    videos = {title: [_enlarge(to_rgb(x), tile_width, smooth) for x in latents] for title, latents in columns.items()}
    if len({(len(rows), len(rows[0])) for rows in videos.values()}) != 1:
        counts = {title: (len(rows), len(rows[0])) for title, rows in videos.items()}
        raise ValueError(f"contact_sheet: columns differ in (videos, frames): {counts}")
    num_frames = len(next(iter(videos.values()))[0])
    return [_sheet(videos, frame, prompts) for frame in range(num_frames)]


def write_sheets_gif(path: Path, sheets: Sequence[Image.Image], frames_per_second: float) -> None:
    """Write the frames of a contact sheet as an endlessly repeated gif of one palette."""
    palette = Image.fromarray(np.concatenate([np.asarray(sheet) for sheet in sheets])).quantize(256)
    frames = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=round(1000 / frames_per_second), loop=0, optimize=False
    )


def _enlarge(rgb: Tensor, tile_width: int, smooth: bool) -> list[Image.Image]:
    pictures = rgb.cpu().numpy()
    size = (tile_width, round(tile_width * pictures.shape[1] / pictures.shape[2]))
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return [Image.fromarray(picture).resize(size, how) for picture in pictures]


def _sheet(videos: Mapping[str, list[list[Image.Image]]], frame: int, prompts: Sequence[str]) -> Image.Image:
    """Frame number `frame` of the contact sheet."""
    width, height = next(iter(videos.values()))[0][0].size
    num_rows = len(next(iter(videos.values())))
    prompt_height = _TITLE_HEIGHT if prompts else 0
    row_height = prompt_height + height + _GAP
    sheet = Image.new("RGB", (_GAP + len(videos) * (width + _GAP), _TITLE_HEIGHT + num_rows * row_height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, (title, rows) in enumerate(videos.items()):
        left = _GAP + column * (width + _GAP)
        draw.text((left, 2), title, fill=_INK)
        for row, video in enumerate(rows):
            sheet.paste(video[frame], (left, _TITLE_HEIGHT + row * row_height + prompt_height))
    for row, prompt in enumerate(prompts[:num_rows]):
        draw.text((_GAP, _TITLE_HEIGHT + row * row_height + 2), _cut(prompt, sheet.width - 2 * _GAP, draw), fill=_INK)
    return sheet


def _cut(text: str, width: int, draw: ImageDraw.ImageDraw) -> str:
    """`text` on one line where it fits into `width` pixels, else its beginning and dots."""
    text = " ".join(text.split())
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
