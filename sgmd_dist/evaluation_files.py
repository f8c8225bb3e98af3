"""What an evaluation leaves in its folder.

scores.json     scores[column][name] of the columns before, after, teacher
protocol.json   what they were measured with, and of what
samples.gif, samples.mp4   some prompts, the columns side by side
report.html     all of it in one page, with the run's curves
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sgmd_dist.comparison import DETAILS, HEADLINE, Comparison, side_by_side
from sgmd_dist.decode import decoder, write_video
from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.evaluation import contact_sheet, write_sheets_gif
from sgmd_dist.protocol import PROTOCOL_FILE, SCORES_FILE, Evaluated, Stored, protocol_bytes
from sgmd_dist.report.curves import read_curves
from sgmd_dist.report.page import Clip, Page, render
from sgmd_dist.sampling import Source

SAMPLES, REPORT_FILE = "samples", "report.html"
NAMES = (SCORES_FILE, PROTOCOL_FILE, f"{SAMPLES}.gif", f"{SAMPLES}.mp4", REPORT_FILE)
ROWS_SHOWN = 6
_SHOWN = ("teacher", "before", "after")
_TILE_WIDTH, _CLIP_TILE_WIDTH, _CLIP_GAP = 240, 256, 4  # pixels


def write(
    folder: Path,
    comparison: Comparison,
    evaluated: Evaluated,
    source: Source,
    device: torch.device,
    against: Stored | None = None,
) -> None:
    """Write every file into `folder`.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, comparison, evaluated, source, device, against)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); make room, or name another folder by --out") from None


def _write(
    folder: Path,
    comparison: Comparison,
    evaluated: Evaluated,
    source: Source,
    device: torch.device,
    against: Stored | None,
) -> None:
    write_durably(folder / SCORES_FILE, (json.dumps(comparison.scores, indent=1) + "\n").encode())
    write_durably(folder / PROTOCOL_FILE, protocol_bytes(comparison.protocol, evaluated))
    is_video_itself = source.pretrained is None or not (source.pretrained / "vae").is_dir()
    frames_per_second = 8 if is_video_itself else 16
    shown = _pictures(comparison, source, device)
    prompts = [comparison.protocol.captions[place] for place in _places(comparison)]
    titles = _titles(comparison)
    columns = {titles[name]: pictures for name, pictures in shown.items()}
    small = contact_sheet(columns, _as_they_are, prompts=prompts)
    write_sheets_gif(folder / f"{SAMPLES}.gif", small, frames_per_second)
    sheets = contact_sheet(columns, _as_they_are, prompts=prompts, tile_width=_TILE_WIDTH)
    frames = torch.from_numpy(np.stack([np.asarray(sheet) for sheet in sheets]))
    write_video(folder / f"{SAMPLES}.mp4", frames, frames_per_second)
    clips = [
        Clip(prompt, _mp4([pictures[row] for pictures in shown.values()], frames_per_second))
        for row, prompt in enumerate(prompts)
    ]
    page = _page(comparison, evaluated, source, against, clips)
    write_durably(folder / REPORT_FILE, render(page).encode())


def _as_they_are(pictures: Tensor) -> Tensor:
    return pictures


def _places(comparison: Comparison) -> list[int]:
    """The videos that are shown: the first ones of prompts spread over the list."""
    count = len(comparison.protocol.prompts)
    return torch.linspace(0, count - 1, min(ROWS_SHOWN, count)).long().tolist()


def _pictures(comparison: Comparison, source: Source, device: torch.device) -> dict[str, list[Tensor]]:
    """The shown videos of each column, decoded: uint8 `[F, H, W, 3]`."""
    to_rgb = decoder(source.pretrained, device)
    return {name: [to_rgb(comparison.videos[name][i]).cpu() for i in _places(comparison)] for name in _SHOWN}


def _titles(comparison: Comparison) -> dict[str, str]:
    few, many = comparison.protocol.student_steps, comparison.protocol.teacher_steps
    return {"teacher": f"teacher, {many} steps", "before": f"before, {few} steps", "after": f"after, {few} steps"}


def _mp4(videos: list[Tensor], frames_per_second: int) -> bytes:
    """Videos uint8 `[F, H, W, 3]` side by side, each `_CLIP_TILE_WIDTH` wide, as an mp4 file's bytes."""
    height, width = videos[0].shape[1:3]
    size = (round(height / width * _CLIP_TILE_WIDTH / 2) * 2, _CLIP_TILE_WIDTH)
    tiles = []
    for video in videos:
        tile = interpolate(video.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True)
        tiles += [tile, torch.full((*tile.shape[:3], _CLIP_GAP), 255.0)]
    rgb = torch.cat(tiles[:-1], dim=3).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, rgb, frames_per_second)
        return path.read_bytes()


def _page(
    comparison: Comparison, evaluated: Evaluated, source: Source, against: Stored | None, clips: list[Clip]
) -> Page:
    protocol = {k: v for k, v in comparison.protocol.as_dict().items() if k != "prompts"}
    return Page(
        title=f"{evaluated.run}, step {evaluated.step}",
        subtitle=f"{source.recipe.objective.name}, {evaluated.which}, {comparison.protocol.student_steps} steps",
        scores=comparison.scores if against is None else side_by_side(comparison.scores, against.scores),
        names=(*HEADLINE, *DETAILS),
        columns=[_titles(comparison)[name] for name in _SHOWN],
        clips=clips,
        curves=read_curves(source.checkpoint.parents[1] / "metrics.jsonl"),
        facts={"Protocol": protocol, "Evaluated": asdict(evaluated)},
        prompts=comparison.protocol.prompts,
    )
