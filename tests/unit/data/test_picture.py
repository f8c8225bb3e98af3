"""Pictures of image-to-video prompts: turned as they are shown, cut as frames of videos are, and refused by name."""

from __future__ import annotations

import tracemalloc
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


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_greys_of_16_bits_are_scaled(tmp_path: Path, ending: str) -> None:
    """Pillow alone makes all above 255 white."""
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16)
    Image.fromarray(np.tile(levels, (4, 1))).save(tmp_path / f"deep.{ending}")
    found = read_picture(tmp_path / f"deep.{ending}", 4, 256, "")
    assert found[0, :, 0].tolist() == list(range(256)) and (found == found[..., :1]).all()


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
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((8, 8), 70000, np.int32)).save(tmp_path / "deep.tiff")
    for name, why in (
        ("gone.png", "no such file"),
        ("junk.png", "cannot identify"),
        ("cut.png", "image file is truncated"),
        (".", "Is a directory"),
        ("float.tiff", "its pixels are floating-point numbers"),
        ("deep.tiff", "its greys are 70000 to 70000, expected 16 bits"),
    ):
        with pytest.raises(UserError, match=rf"^--prompts: image .*: cannot be read as a picture \(.*{why}"):
            check_picture(tmp_path / name, "--prompts")
        with pytest.raises(UserError, match=rf"^--prompts: image .*: cannot be read as a picture \(.*{why}"):
            read_picture(tmp_path / name, 8, 8, "--prompts")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_notes_of_a_camera_are_an_error_like_others(tmp_path: Path) -> None:
    """Pillow's exceptions depend on the byte that is damaged."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    Image.fromarray(thirds(16, 16)).save(tmp_path / "whole.jpg", exif=exif)
    whole = (tmp_path / "whole.jpg").read_bytes()
    start, refused = whole.index(b"Exif"), 0
    for place in range(start, start + 60):
        (tmp_path / "flipped.jpg").write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            assert read_picture(tmp_path / "flipped.jpg", 8, 8, "").shape == (8, 8, 3)
        except UserError:
            refused += 1
    assert refused > 0


def test_a_strip_takes_no_more_memory_than_what_is_seen_of_it(tmp_path: Path) -> None:
    """Enlarged as a whole it would be 10 GB."""
    strip = np.zeros((1, 10000, 3), np.uint8)
    strip[:, 4990:5010] = 255
    Image.fromarray(strip).save(tmp_path / "strip.png")
    tracemalloc.start()
    found = read_picture(tmp_path / "strip.png", 480, 832, "")
    assert found.shape == (480, 832, 3) and (found == 255).all()
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
