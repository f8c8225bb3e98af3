"""Picture files to the pixels of a video's first frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sgmd_dist.data.video import Bucket, cover
from sgmd_dist.errors import UserError


def check_picture(path: Path, said: str) -> None:
    """Look at a picture's head.

    Raises:
        UserError: there is no such file, or it is no picture; the message begins with `said`.
    """
    try:
        Image.open(path).close()
    except _UNREADABLE as error:
        raise _unreadable(path, said, error) from None


def read_picture(path: Path, height: int, width: int, said: str) -> Tensor:
    """A picture as it is shown, resized to cover `height` x `width` and cut at the centre, as `prepare.py videos` does
    with frames: uint8 `[H, W, 3]`. What is transparent is white.

    Raises:
        UserError: it cannot be read; the message begins with `said`.
    """
    try:
        with Image.open(path) as file:
            picture = _opaque(ImageOps.exif_transpose(file))
    except _UNREADABLE as error:
        raise _unreadable(path, said, error) from None
    fit = cover(picture.height, picture.width, Bucket(1, height, width))
    resized = picture.resize((fit.width, fit.height), Image.Resampling.BICUBIC)
    cut = resized.crop((fit.left, fit.top, fit.left + width, fit.top + height))
    return torch.from_numpy(np.array(cut))


def _opaque(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


# Pillow's decoders raise SyntaxError for some damage, and refuse pictures of hundreds of megapixels.
_UNREADABLE = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)


def _unreadable(path: Path, said: str, error: BaseException) -> UserError:
    why = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:200]
    return UserError(f"{said}: image {path}: cannot be read as a picture ({why}); name a PNG, JPEG or WebP file")
