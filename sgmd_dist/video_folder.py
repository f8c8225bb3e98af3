"""A folder of videos, one for each prompt and seed, with what they are of.

0000-seed-0.mp4  number of the prompt, seed
videos.json      what made them; of each its prompt
sheet.gif        all in one picture, a row for each prompt and a column for each seed
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sgmd_dist.decode import write_video
from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.evaluation import contact_sheet, write_sheets_gif

INDEX = "videos.json"
TILE_WIDTH = 160
TILE_FRAMES = 16
_SHEET_SECONDS = 3.0
_GIF_PIXELS = 2**16 - 1  # a side, by the format


@dataclass(frozen=True)
class Take:
    """One video to make: prompt `number` (from 0) of a list, and the seed of its noise."""

    number: int
    caption: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.number:04d}-seed-{self.seed}"


def takes_of(captions: Sequence[str], seeds: Sequence[int]) -> list[Take]:
    """Every prompt with every seed, prompt by prompt."""
    return [Take(number, caption, seed) for number, caption in enumerate(captions) for seed in seeds]


def write_take(folder: Path, take: Take, rgb: Tensor, formats: Sequence[str], frames_per_second: int) -> list[Path]:
    """Write a video's pictures uint8 `[F, H, W, 3]` in each format; returns the files.

    Raises:
        UserError: see `write_video`.
    """
    paths = [folder / f"{take.name}.{ending}" for ending in formats]
    for path in paths:
        write_video(path, rgb, frames_per_second)
    return paths


def tile_of(rgb: Tensor) -> Tensor:
    """A video's place on a sheet: at most `TILE_FRAMES` of its pictures, at most `TILE_WIDTH` wide; uint8."""
    count = min(len(rgb), TILE_FRAMES)
    chosen = rgb[torch.linspace(0, len(rgb) - 1, count).round().long()].cpu()
    if (width := chosen.shape[2]) <= TILE_WIDTH:
        return chosen
    size = (max(1, round(chosen.shape[1] * TILE_WIDTH / width)), TILE_WIDTH)
    smaller = interpolate(chosen.permute(0, 3, 1, 2).float(), size, mode="area")
    return smaller.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def sheet_of(takes: Sequence[Take], tiles: Mapping[Take, Tensor]) -> list[Image.Image]:
    """A picture for each frame of the tiles: a row for each prompt, a column for each seed."""
    captions = {take.number: take.caption for take in takes}
    seeds = dict.fromkeys(take.seed for take in takes)
    columns = {f"seed {seed}": [tiles[Take(*row, seed)] for row in captions.items()] for seed in seeds}
    return contact_sheet(columns, lambda rgb: rgb, prompts=[*captions.values()], tile_width=TILE_WIDTH)


def write_sheet(path: Path, sheets: Sequence[Image.Image]) -> None:
    """Write a sheet as .gif, in motion, or as .png, its middle frame.

    Raises:
        UserError: the file cannot be written, or a gif would be too large.
    """
    if path.suffix == ".gif" and max(sheets[0].size) > _GIF_PIXELS:
        width, height = sheets[0].size
        raise UserError(
            f"{path}: {width} x {height} pixels: a gif has at most {_GIF_PIXELS} a side; take fewer prompts or seeds"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gif":
            write_sheets_gif(path, sheets, max(1.0, len(sheets) / _SHEET_SECONDS))
        else:
            sheets[len(sheets) // 2].save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another folder") from None


def write_index(folder: Path, takes: Sequence[Take], formats: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Write videos.json: `facts`, and of each video its files, prompt and seed.

    Raises:
        UserError: the file cannot be written.
    """
    videos = [
        {
            "files": [f"{take.name}.{ending}" for ending in formats],
            "prompt_number": take.number,
            "prompt": take.caption,
            "seed": take.seed,
        }
        for take in takes
    ]
    content = json.dumps({**facts, "videos": videos}, indent=1, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / INDEX, content.encode())
    except OSError as error:
        raise UserError(f"{folder / INDEX}: cannot be written ({error}); choose another folder") from None
