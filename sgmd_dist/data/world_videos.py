"""The moving-shapes world as real videos, and a whole pipeline whose VAE sees them as the world's latents.

A latent pixel of the world becomes 8 x 8 pixels of a video, and each frame but the first becomes 4: the strides of
Wan's VAE. The VAE is diffusers' `AutoencoderKLWan` with weights set by hand, so that it needs no training: it averages
each such cell, and paints it back. A teacher of the world's latents is thus one of its videos.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from sgmd_dist.data.encode import TextEncoder
from sgmd_dist.data.world import AMPLITUDE, latents_to_rgb

SPATIAL, TEMPORAL = 8, 4
_WIDTH = 8  # channels: +r, -r, +g, -g, +b, -b, a constant, nothing
_CONSTANT = 6
_LEVEL = (
    100.0  # of the constant; colours are at most 1, so that the norm before the head is nearly that of the constant
)


def world_video(latents: Tensor) -> Tensor:
    """World latents `[C, F, H, W]` as a video `[4 (F - 1) + 1, 8 H, 8 W, 3]`, uint8."""
    rgb = latents_to_rgb(latents, SPATIAL)
    repeats = torch.tensor([1] + [TEMPORAL] * (len(rgb) - 1))
    return rgb.repeat_interleave(repeats, dim=0)


def write_world_pipeline(folder: Path, pretrained: Path) -> None:
    """Write a diffusers folder of a `WanPipeline`: `pretrained` with a VAE for the world's videos and a scheduler.

    Args:
        pretrained: has transformer, text_encoder and tokenizer of the world, as `recipes/tiny_wan`.

    Raises:
        UserError: the text encoder is missing or damaged.
    """
    text = TextEncoder.from_pretrained(pretrained)
    parts: dict[str, Any] = {
        "tokenizer": text.tokenizer,
        "text_encoder": text.encoder,
        "transformer": WanTransformer3DModel.from_pretrained(pretrained / "transformer", local_files_only=True),
        "vae": world_vae(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    }
    WanPipeline(**parts).save_pretrained(folder)


@torch.no_grad()
def world_vae() -> AutoencoderKLWan:
    """The VAE: 3 latent channels, the mean colour of a cell over what makes the world's latents of it."""
    vae = AutoencoderKLWan(
        base_dim=_WIDTH,
        z_dim=3,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 3,
        latents_std=[1 / AMPLITUDE] * 3,
    )
    for name, parameter in vae.named_parameters():
        parameter.fill_(1.0 if name.endswith("gamma") else 0.0)  # residual blocks and attention hand their input on
    network: Any = vae
    _pass_on(network.quant_conv, torch.eye(6))
    _pass_on(network.post_quant_conv, torch.eye(3))
    _set_encoder(network.encoder)
    _set_decoder(network.decoder)
    return vae


def _set_encoder(encoder: Any) -> None:
    _pass_on(encoder.conv_in, _signs())
    encoder.conv_in.bias[_CONSTANT] = _LEVEL
    for layer in encoder.down_blocks:
        mode = getattr(layer, "mode", None)
        if mode is not None:
            layer.resample[1].weight[:, :, :2, :2] = torch.eye(_WIDTH)[..., None, None] / 4
        if mode == "downsample3d":
            layer.time_conv.weight[:, :, 1:, 0, 0] = torch.eye(_WIDTH)[..., None] / 2
    _pass_on(encoder.conv_out, _differences())


def _set_decoder(decoder: Any) -> None:
    """Between its blocks is room for half of the channels: colours and constant. Signs come with the last block."""
    half = _WIDTH // 2
    _pass_on(decoder.conv_in, torch.eye(3))
    decoder.conv_in.bias[half - 1] = _LEVEL
    for block in decoder.up_blocks:
        if block.resnets[0].in_dim == half:
            _pass_on(block.resnets[0].conv_shortcut, torch.eye(half))
        for up in block.upsamplers or []:
            _pass_on(up.resample[1], torch.eye(half))
            if up.mode == "upsample3d":
                _pass_on(up.time_conv, torch.eye(_WIDTH).repeat(2, 1))
    signs = torch.zeros(_WIDTH, half)
    signs[:, : half - 1] = _signs()
    signs[_CONSTANT, half - 1] = 1.0
    _pass_on(decoder.up_blocks[-1].resnets[0].conv_shortcut, signs)
    _pass_on(decoder.conv_out, _differences())


def _signs() -> Tensor:
    """`[_WIDTH, 3]`: each colour as it is, and negated in the channel behind."""
    signs = torch.zeros(_WIDTH, 3)
    for colour in range(3):
        signs[2 * colour, colour], signs[2 * colour + 1, colour] = 1.0, -1.0
    return signs


def _differences() -> Tensor:
    """`[3, _WIDTH]`: the colours out of what norm and silu make of the channels: silu(x) - silu(-x) = x."""
    return _signs().T * _LEVEL / math.sqrt(_WIDTH)


def _pass_on(convolution: Any, matrix: Tensor) -> None:
    """Make a convolution a matrix `[rows, columns]` on the first channels of each pixel, of its own frame."""
    weight = convolution.weight[: matrix.shape[0], : matrix.shape[1]]
    taps = (-1, *(size // 2 for size in weight.shape[3:])) if weight.dim() == 5 else (weight.shape[2] // 2,) * 2
    weight[(..., *taps)] = matrix
