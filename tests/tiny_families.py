"""Every family but Wan in small: a random network in a folder that diffusers wrote, and its pipeline's call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor, nn

LATENTS = (3, 3, 8, 8)  # of the tests' moving-shapes world
TEXT_WIDTH = 32


@dataclass(frozen=True)
class Family:
    """A family's network in small.

    Attributes:
        velocity: what the family's pipeline computes, as a velocity `[B, C, F, H, W]` of latents at `sigma`, for text
            `[B, T, D]` of which `lengths` tokens count.
        unused: parts of the network that text to video never reaches.
    """

    name: str
    network: Any
    config: dict[str, Any]
    velocity: Callable[[nn.Module, Tensor, Tensor, Tensor, list[int]], Tensor]
    unused: frozenset[str] = frozenset()
    splits_sequences: bool = False

    def random(self, seed: int = 0) -> Any:
        """A network whose parameters are all random, also those that diffusers sets to one or zero."""
        torch.manual_seed(seed)
        module = self.network(**self.config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return module

    def save(self, folder: Path, seed: int = 0) -> Path:
        """A pipeline's folder, as far as this project reads it."""
        self.random(seed).save_pretrained(folder / "transformer")
        return folder


def mask_of(text: Tensor, lengths: list[int]) -> Tensor:
    return torch.arange(text.shape[1]) < torch.tensor(lengths)[:, None]


def _ltx(module: nn.Module, x: Tensor, sigma: Tensor, text: Tensor, lengths: list[int]) -> Tensor:
    """LTXPipeline's loop body at its default of 25 frames per second."""
    _, _, frames, height, width = x.shape
    output = module(
        hidden_states=LTXPipeline._pack_latents(x),
        encoder_hidden_states=text,
        timestep=1000 * sigma,
        encoder_attention_mask=mask_of(text, lengths),
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(8 / 25, 32, 32),
        return_dict=False,
    )[0]
    return LTXPipeline._unpack_latents(output, frames, height, width)


LTX = Family(
    "ltx",
    LTXVideoTransformer3DModel,
    {
        "in_channels": 3, "out_channels": 3, "num_attention_heads": 3, "attention_head_dim": 12,
        "cross_attention_dim": 36, "num_layers": 2, "caption_channels": TEXT_WIDTH,
    },
    _ltx,
    splits_sequences=True,
)  # fmt: skip

FAMILIES = {family.name: family for family in (LTX,)}
