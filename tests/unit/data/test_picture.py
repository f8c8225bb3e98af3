"""Pictures of image-to-video prompts: turned as they are shown, cut as frames of videos are, and refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sgmd_dist.data.picture import check_picture, read_picture
from sgmd_dist.errors import UserError


def thirds(height: int, width: int) -> np.ndarray:
    """Red, green and blue stripes from left to right."""
    picture = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        picture[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 255
    return picture


def test_it_is_cut_at_the_centre(tmp_path: Path) -> None:
    Image.fromarray(thirds(20, 60)).save(tmp_path / "wide.png")
    found = read_picture(tmp_path / "wide.png", 10, 10, "")
    assert found.shape == (10, 10, 3) and found.dtype == torch.uint8
    assert (found[:, 2:8] == torch.tensor([0, 255, 0], dtype=torch.uint8)).all(), "the green third"
    assert found[0, 0, 1] > 128 and found[0, 9, 1] > 128


def test_a_picture_of_the_size_stays_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "same.png")
    assert np.array_equal(read_picture(tmp_path / "same.png", 16, 24, "").numpy(), pixels)


def test_it_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(thirds(30, 60)).save(tmp_path / "turned.png", exif=exif)
    found = read_picture(tmp_path / "turned.png", 60, 30, "")
    assert found[5, 15].tolist() == [255, 0, 0] and found[55, 15].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).convert(mode).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png", 8, 8, "") == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_colours_become_red_green_and_blue(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("black.jpg" if mode == "CMYK" else "black.png")
    Image.new(mode, (8, 8), (0, 0, 0, 255) if mode == "CMYK" else 0).save(path)
    found = read_picture(path, 8, 8, "")
    assert found.shape == (8, 8, 3) and int(found.max()) < 8


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "junk.png").write_bytes(b"no picture")
    Image.fromarray(thirds(60, 60)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    for name, why in (("gone.png", "no such file"), ("junk.png", "cannot identify")):
        with pytest.raises(UserError, match=rf"^--prompts a: image .*{name}: cannot be read as a picture \({why}"):
            check_picture(tmp_path / name, "--prompts a")
    check_picture(tmp_path / "cut.png", "its head is whole")
    for name in ("gone.png", "junk.png", "cut.png", "."):
        with pytest.raises(UserError, match=r"^--prompts a: image .*: cannot be read as a picture"):
            read_picture(tmp_path / name, 8, 8, "--prompts a")
