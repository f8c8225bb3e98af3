"""Every family but Wan in small: a random network in a folder that diffusers wrote, and its pipeline's call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from torch import Tensor, nn

LATENTS = (3, 3, 8, 8)  # of the tests' moving-shapes world
TEXT_WIDTH = 32
COGVIDEOX_SCHEDULER = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}


@dataclass(frozen=True)
class Family:
    """A family's network in small.

    Attributes:
        velocity: what the family's pipeline computes, as a velocity `[B, C, F, H, W]` of latents at `sigma`, for text
            `[B, T, D]` of which `lengths` tokens count.
        unused: beginnings of the names of parameters that the velocity of text to video does not depend on.
        scheduler: what a pipeline's folder must say of the family's noise levels.
        alone: keys of the `model` section that say it for a transformer's folder alone.
    """

    name: str
    network: Any
    config: dict[str, Any]
    velocity: Callable[[nn.Module, Tensor, Tensor, Tensor, list[int]], Tensor]
    unused: tuple[str, ...] = ()
    splits_sequences: bool = False
    scheduler: Any = None
    alone: Mapping[str, Any] = field(default_factory=dict)

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
        if self.scheduler is not None:
            self.scheduler.save_pretrained(folder / "scheduler")
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


def _cogvideox(module: nn.Module, x: Tensor, sigma: Tensor, text: Tensor, lengths: list[int]) -> Tensor:
    """CogVideoXPipeline's loop body, sample by sample, at timesteps whose ratio of signal to noise is the flow's."""
    pipe = CogVideoXPipeline(None, None, None, module, CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULER))
    rotary = None
    if module.config.use_rotary_positional_embeddings:
        height, width = (size * pipe.vae_scale_factor_spatial for size in x.shape[3:])
        rotary = pipe._prepare_rotary_positional_embeddings(height, width, x.shape[2], x.device)
    products = pipe.scheduler.alphas_cumprod
    velocities = []
    for sample, level, prompt in zip(x.double(), sigma.double(), text, strict=True):
        product = (1 - level) ** 2 / ((1 - level) ** 2 + level**2)
        above = int((products > product).sum())  # the product is between two timesteps'
        ways = [(p**0.5, (1 - p) ** 0.5) for p in (products[above - 1], products[above])]
        low, high = (noise / (signal + noise) for signal, noise in ways)
        timestep = above - 1 + (level - low) / (high - low)
        z = (product**0.5 / (1 - level)) * sample
        v = module(
            hidden_states=z.float().transpose(0, 1)[None],
            encoder_hidden_states=prompt[None],
            timestep=timestep[None],
            image_rotary_emb=rotary,
            return_dict=False,
        )[0][0].transpose(0, 1)
        x0 = product**0.5 * z - (1 - product) ** 0.5 * v
        velocities.append((sample - x0) / level)
    return torch.stack(velocities).float()


COGVIDEOX = Family(
    "cogvideox",
    CogVideoXTransformer3DModel,
    {
        "in_channels": 3, "out_channels": 3, "num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2,
        "time_embed_dim": 20, "text_embed_dim": TEXT_WIDTH, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
        "max_text_seq_length": 5, "use_rotary_positional_embeddings": True,
    },
    _cogvideox,
    scheduler=CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULER),
    alone={"noise_schedule": COGVIDEOX_SCHEDULER},
)  # fmt: skip


def _hunyuan(module: nn.Module, x: Tensor, sigma: Tensor, text: Tensor, lengths: list[int]) -> Tensor:
    """HunyuanVideo15Pipeline's loop body for prompts without quotes."""
    batch, channels = x.shape[:2]
    condition = torch.zeros(batch, channels + 1, *x.shape[2:])
    return module(
        hidden_states=torch.cat([x, condition], 1),
        image_embeds=torch.zeros(batch, 7, module.config.image_embed_dim),
        timestep=1000 * sigma,
        encoder_hidden_states=text,
        encoder_attention_mask=mask_of(text, lengths).float(),
        encoder_hidden_states_2=torch.zeros(batch, 4, module.config.text_embed_2_dim),
        encoder_attention_mask_2=torch.zeros(batch, 4),
        return_dict=False,
    )[0]


HUNYUAN = Family(
    "hunyuan_video_15",
    HunyuanVideo15Transformer3DModel,
    {
        "in_channels": 7, "out_channels": 3, "num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2,
        "num_refiner_layers": 1, "text_embed_dim": TEXT_WIDTH, "text_embed_2_dim": 12, "image_embed_dim": 10,
        "rope_axes_dim": (4, 6, 6),
    },
    _hunyuan,
    unused=("image_embedder.", "context_embedder_2.", "transformer_blocks.1."),
)  # fmt: skip

FAMILIES = {family.name: family for family in (LTX, COGVIDEOX, HUNYUAN)}
