"""A video VAE both ways: videos to the latents that transformers see, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
)
from safetensors import SafetensorError
from torch import Tensor

from sgmd_dist.errors import UserError


@dataclass(frozen=True)
class _Facts:
    """What a VAE says of its latents.

    Attributes:
        mean, std: of each channel, or of all.
        frames, pixels: of a latent.
        chunk: frames that it encodes at a time after the lone first one.
    """

    mean: list[float]
    std: list[float]
    channels: int
    frames: int
    pixels: int
    chunk: int


def _wan(vae: Any) -> _Facts:
    config = vae.config
    strides = int(config.scale_factor_temporal), int(config.scale_factor_spatial)
    # It encodes four frames at a time whatever its strides.
    return _Facts(list(config.latents_mean), list(config.latents_std), int(config.z_dim), *strides, 4)


def _ltx(vae: Any) -> _Facts:
    mean, std = vae.latents_mean.float(), vae.latents_std.float() / vae.config.scaling_factor
    strides = int(vae.temporal_compression_ratio), int(vae.spatial_compression_ratio)
    return _Facts(mean.tolist(), std.tolist(), int(vae.config.latent_channels), *strides, strides[0])


def _cogvideox(vae: Any) -> _Facts:
    config = vae.config
    strides = int(config.temporal_compression_ratio), 2 ** (len(config.block_out_channels) - 1)
    return _Facts([0.0], [1 / config.scaling_factor], int(config.latent_channels), *strides, strides[0])


def _hunyuan_video_15(vae: Any) -> _Facts:
    strides = int(vae.temporal_compression_ratio), int(vae.spatial_compression_ratio)
    config = vae.config
    return _Facts([0.0], [1 / config.scaling_factor], int(config.latent_channels), *strides, strides[0])


_Kind = tuple[Any, Callable[[Any], _Facts]]
_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "AutoencoderKLWan": (AutoencoderKLWan, _wan),
        "AutoencoderKLLTXVideo": (AutoencoderKLLTXVideo, _ltx),
        "AutoencoderKLCogVideoX": (AutoencoderKLCogVideoX, _cogvideox),
        "AutoencoderKLHunyuanVideo15": (AutoencoderKLHunyuanVideo15, _hunyuan_video_15),
    }
)


class Autoencoder:
    """A VAE with the mean and std of its latents. Latents here are the transformer's: `(z - mean) / std`."""

    def __init__(self, vae: Any) -> None:
        """vae: of a class of `_KINDS`."""
        self._vae: Any = vae.eval().requires_grad_(False)
        self._device: torch.device | str = "cpu"
        facts = _KINDS[type(vae).__name__][1](vae)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None, None] for values in (facts.mean, facts.std)
        )
        self._channels = facts.channels
        self._stride = (facts.frames, facts.pixels)
        self._chunk = facts.chunk

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Autoencoder:
        """The VAE of a diffusers folder's `vae` part, from local files only.

        Raises:
            UserError: `folder` cannot be read as the VAE of a model family.
        """
        name = AutoencoderKLWan.__name__
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
            if found not in _KINDS:
                raise ValueError(f"config.json describes {found}, known are {', '.join(_KINDS)}")
            name = found
            loaded: Any = _KINDS[name][0].from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, torch_dtype=dtype
            )
            vae, report = loaded
            if missing := sorted(report["missing_keys"]):  # diffusers would leave them random
                raise ValueError(f"{len(missing)} tensors are missing, as {missing[0]}")
            autoencoder = cls(vae)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(f"{folder}: cannot be read as an {name} ({why}); download it again") from error
        return autoencoder.to(device)

    def to(self, device: torch.device | str) -> Autoencoder:
        """Move the network to `device`; returns this object."""
        self._vae.to(device)
        self._mean, self._std, self._device = self._mean.to(device), self._std.to(device), device
        return self

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a video's latents.

        Raises:
            UserError: the video is not of whole chunks behind its first frame, as 4n + 1, and of whole latents.
        """
        temporal, spatial = self._stride
        if num_frames < 1 or num_frames % self._chunk != 1:
            below = max(1, (num_frames - 1) // self._chunk * self._chunk + 1)
            raise UserError(
                f"{num_frames} frames: the VAE takes {self._chunk}n + 1; use {below} or {below + self._chunk}"
            )
        for name, size in (("height", height), ("width", width)):
            if size < spatial or size % spatial:
                below = max(spatial, size // spatial * spatial)
                raise UserError(
                    f"{name} {size}: expected a multiple of the VAE's {spatial} pixels; use {below} or"
                    f" {below + spatial}"
                )
        return (self._channels, (num_frames - 1) // temporal + 1, height // spatial, width // spatial)

    def video_size(self, latent_shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the video whose latents have this shape."""
        (temporal, spatial), (_, frames, height, width) = self._stride, latent_shape
        return (frames - 1) * temporal + 1, height * spatial, width * spatial

    @torch.no_grad()
    def encode(self, rgb: Tensor) -> Tensor:
        """Pictures uint8 `[F, H, W, 3]` -> latents float32 `[C, F', H', W']` on the CPU.

        They are the posterior's mode, not a sample: equal videos give equal latents, by whichever rank and attempt, and
        training adds noise of its own.
        """
        return self._encode_pixels(self._pixels(rgb))

    @torch.no_grad()
    def encode_first(self, rgb: Tensor) -> Tensor:
        """The same of a video's first picture followed by grey ones: what image-to-video networks see of the picture,
        as diffusers' `WanImageToVideoPipeline` prepares it."""
        pixels = self._pixels(rgb[:1])
        grey = pixels.new_zeros(*pixels.shape[:2], len(rgb) - 1, *pixels.shape[3:])
        return self._encode_pixels(torch.cat([pixels, grey], 2))

    def _pixels(self, rgb: Tensor) -> Tensor:
        """uint8 `[F, H, W, 3]` -> float32 in [-1, 1], `[1, 3, F, H, W]`, on the device."""
        return rgb.to(self._device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        mode = self._vae.encode(pixels.to(self._vae.dtype)).latent_dist.mode()[0]
        return ((mode.float() - self._mean) / self._std).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[C, F', H', W']` -> pictures uint8 `[F, H, W, 3]` on the CPU."""
        scaled = latents.to(self._device) * self._std + self._mean
        z = scaled[None].to(self._vae.dtype)
        # LTX-Video's later decoders take out the noise of a timestep: none, its pipeline's default.
        needs_timestep = getattr(self._vae.config, "timestep_conditioning", False)
        pixels = self._vae.decode(z, *[z.new_zeros(1)] * needs_timestep).sample[0]
        return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()
