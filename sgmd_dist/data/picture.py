"""Picture files to the pixels of a video's first frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sgmd_dist.errors import UserError

_DEEPEST = 2**16 - 1  # of greys that are not of 8 bits


def check_picture(path: Path, said: str) -> None:
    """Read a picture and forget it.

    Raises:
        UserError: see `read_picture`.
    """
    _opened(path, said)


def read_picture(path: Path, height: int, width: int, said: str) -> Tensor:
    """A picture as it is shown, resized to cover `height` x `width` and cut at the centre, as `prepare.py videos` does
    with frames: uint8 `[H, W, 3]`. What is transparent is white; of one in motion it is the first.

    Raises:
        UserError: it cannot be read, or holds what is no 8 or 16 bits a channel; the message begins with `said`.
    """
    # Pillow resizes only what is seen: a whole strip would become gigabytes.
    fitted = ImageOps.fit(_opened(path, said), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted))


def _opened(path: Path, said: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            return _opaque(_of_8_bits(ImageOps.exif_transpose(file)))
    except Exception as error:  # each of Pillow's decoders has exceptions of its own for damage
        why = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:200]
        raise UserError(
            f"{said}: image {path}: cannot be read as a picture ({why}); name a PNG, JPEG or WebP file, or save this"
            " one anew"
        ) from None


def _of_8_bits(picture: Image.Image) -> Image.Image:
    """Pillow cuts deeper greys off at 255 instead of scaling them."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > _DEEPEST:
        raise ValueError(f"its greys are {values.min()} to {values.max()}, expected 16 bits")
    return Image.fromarray((values * 255 / _DEEPEST).round().astype(np.uint8))


def _opaque(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
