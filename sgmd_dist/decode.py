"""From latents to pictures and video files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sgmd_dist.autoencoder import Autoencoder
from sgmd_dist.errors import UserError

ToRgb = Callable[[Tensor], Tensor]  # latents [C, F, H, W] -> uint8 [F', H', W', 3]

_AMPLITUDE = 3.0  # of latents that are the video itself: +-3 becomes black and white


def latents_as_rgb(latents: Tensor) -> Tensor:
    """Latents that are the video itself: the first three channels (or the first, thrice) as red, green, blue."""
    channels = latents[:3] if latents.shape[0] >= 3 else latents[:1].expand(3, -1, -1, -1)
    unit = (0.5 + channels.float() / (2 * _AMPLITUDE)).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def decoder(pretrained: Path | None, device: torch.device | str = "cpu") -> ToRgb:
    """How latents of a pretrained pipeline become pictures: its Wan VAE where `pretrained`/vae exists, else the
    latents themselves.

    Raises:
        UserError: the VAE's folder cannot be read.
    """
    if pretrained is None or not (pretrained / "vae").is_dir():
        return latents_as_rgb
    return Autoencoder.load(pretrained / "vae", device).decode


def write_video(path: Path, rgb: Tensor, frames_per_second: int = 16) -> None:
    """Write pictures uint8 `[F, H, W, 3]` as .mp4 (H.264), .gif, or .png (the frames side by side).

    Raises:
        UserError: the ending is none of these, the pictures do not suit it, or the file cannot be written.
    """
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png}
    if path.suffix not in writers:
        raise UserError(f"{path}: cannot write '{path.suffix}' files; expected one of {', '.join(writers)}")
    if frames_per_second < 1:
        raise UserError(f"{path}: {frames_per_second} frames per second: expected at least 1")
    smallest = 2 if path.suffix == ".mp4" else 1
    if len(rgb) < 1 or min(rgb.shape[1:3]) < smallest:
        raise UserError(
            f"{path}: {len(rgb)} frames of {rgb.shape[1]} x {rgb.shape[2]} pixels: expected at least one frame of"
            f" {smallest} x {smallest}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[path.suffix](path, rgb.cpu().numpy(), frames_per_second)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another folder") from None


def _write_mp4(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    height, width = (size // 2 * 2 for size in frames.shape[1:3])  # 4:2:0 video needs even sizes
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=round(1000 / frames_per_second), loop=0)


def _write_png(path: Path, frames: np.ndarray, frames_per_second: int) -> None:
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(path)
