"""A folder of videos: their names, the sheet of all, and what is written beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sgmd_dist.errors import UserError
from sgmd_dist.video_folder import (
    TILE_FRAMES,
    TILE_WIDTH,
    sheet_of,
    takes_of,
    tile_of,
    write_index,
    write_sheet,
    write_take,
)

TAKES = takes_of(["a ball", "a bar"], [3, 5])


def test_every_prompt_is_taken_with_every_seed() -> None:
    assert [(take.number, take.caption, take.seed) for take in TAKES] == [
        (0, "a ball", 3), (0, "a ball", 5), (1, "a bar", 3), (1, "a bar", 5)
    ]  # fmt: skip
    assert TAKES[3].name == "0001-seed-5"


def test_a_video_is_written_in_each_format(tmp_path: Path) -> None:
    paths = write_take(tmp_path, TAKES[0], torch.zeros(2, 4, 4, 3, dtype=torch.uint8), ["gif", "png"], 8)
    assert [path.name for path in paths] == ["0000-seed-3.gif", "0000-seed-3.png"] and all(p.is_file() for p in paths)


def test_a_small_video_is_its_own_tile_and_a_large_one_is_made_smaller() -> None:
    small = torch.randint(0, 255, (5, 6, 8, 3), dtype=torch.uint8)
    assert torch.equal(tile_of(small), small)
    large = torch.arange(81, dtype=torch.uint8)[:, None, None, None].expand(81, 48, 4 * TILE_WIDTH, 3)
    tile = tile_of(large)
    assert tile.shape == (TILE_FRAMES, 12, TILE_WIDTH, 3)
    assert [int(tile[place, 0, 0, 0]) for place in (0, -1)] == [0, 80], "from the first frame to the last"


def test_the_sheet_has_a_row_for_each_prompt_and_a_column_for_each_seed(tmp_path: Path) -> None:
    colours = {
        take: torch.tensor([[40 * place, 0, 50 + 50 * frame] for frame in range(3)]) for place, take in enumerate(TAKES)
    }
    tiles = {
        take: colour[:, None, None].expand(3, 20, TILE_WIDTH, 3).to(torch.uint8) for take, colour in colours.items()
    }
    sheets = sheet_of(TAKES, tiles)
    assert len(sheets) == 3
    shown = [
        sheets[1].getpixel((4 + column * (TILE_WIDTH + 4) + 50, 16 + row * 40 + 30))
        for row in (0, 1)
        for column in (0, 1)
    ]
    assert shown == [(40 * place, 0, 100) for place in range(4)]
    for name, frames in (("sheet.gif", 3), ("sheet.png", 1)):
        write_sheet(tmp_path / name, sheets)
        with Image.open(tmp_path / name) as picture:
            assert getattr(picture, "n_frames", 1) == frames


def test_a_prompt_of_several_lines_is_shown_on_one() -> None:
    tile = torch.zeros(1, 30, 120, 3, dtype=torch.uint8)
    takes = [takes_of([caption], [0]) for caption in ("a ball,\n  moving\n", "a ball, moving")]
    shown, expected = (sheet_of([take], {take: tile})[0].tobytes() for [take] in takes)
    assert shown == expected


def test_the_index_says_what_each_video_is_of(tmp_path: Path) -> None:
    write_index(tmp_path / "new", TAKES, ["mp4", "gif"], {"steps": 4})
    index = json.loads((tmp_path / "new/videos.json").read_text())
    assert index["steps"] == 4 and len(index["videos"]) == 4
    assert index["videos"][2] == {
        "files": ["0001-seed-3.mp4", "0001-seed-3.gif"], "prompt_number": 1, "prompt": "a bar", "seed": 3
    }  # fmt: skip


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/videos.json: cannot be written .*; choose another folder"):
        write_index(tmp_path / "file", TAKES, ["mp4"], {})
    with pytest.raises(UserError, match=r"file/sheet.png: cannot be written .*; choose another folder"):
        write_sheet(tmp_path / "file/sheet.png", [Image.new("RGB", (4, 4))])


def test_a_gif_that_would_be_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sheet.gif: 4 x 65536 pixels: a gif has at most 65535 a side; take fewer"):
        write_sheet(tmp_path / "sheet.gif", [Image.new("RGB", (4, 2**16))])
