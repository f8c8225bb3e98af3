"""The LTX-Video family on diffusers' `LTXVideoTransformer3DModel`, text to video: 0.9.x of 2B and 13B.

Its pipeline packs latents into tokens `[B, F H W, C]`, masks the padding of the text in cross-attention, and measures
rotary angles in seconds and pixels, so that it needs the frame rate. From 0.9.5 on it is `LTXConditionPipeline` without
conditions: it counts the first latent frame as the one video frame that it is, and reads longer prompts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.loaders import LTXVideoLoraLoaderMixin
from pydantic import Field, model_validator
from torch import Tensor, nn

from sgmd_dist.conditions import Condition, text_of
from sgmd_dist.flow import NUM_TRAIN_TIMESTEPS
from sgmd_dist.models._diffusers import DiffusersModel, build_architecture, build_model
from sgmd_dist.models._folder import read_object
from sgmd_dist.models._ltx_attention import attach
from sgmd_dist.models._text import text_mask
from sgmd_dist.models.base import SchedulerCall, SequenceAxis, TextEncoding
from sgmd_dist.recipe import ModelSection, wrong
from sgmd_dist.recipe import Section as RecipeSection

NETWORK = LTXVideoTransformer3DModel

_TEMPORAL_STRIDE, _SPATIAL_STRIDE = 8, 32  # of its VAE
_TEXT_TOKENS, _CAUSAL_TEXT_TOKENS = 128, 256  # of its pipelines
_INDEX, _CAUSAL_PIPELINE = "model_index.json", "LTXConditionPipeline"


class LtxConfig(RecipeSection):
    """Arguments of diffusers' `LTXVideoTransformer3DModel`."""

    in_channels: int = Field(128, ge=1)
    out_channels: int = Field(128, ge=1)
    patch_size: Literal[1] = 1
    patch_size_t: Literal[1] = 1
    num_attention_heads: int = Field(32, ge=1)
    attention_head_dim: int = Field(64, ge=2)
    cross_attention_dim: int = Field(2048, ge=1)
    num_layers: int = Field(28, ge=1)
    norm_elementwise_affine: bool = False
    norm_eps: float = Field(1e-6, gt=0)
    caption_channels: int = Field(4096, ge=1)
    attention_bias: bool = True
    attention_out_bias: bool = True

    @model_validator(mode="after")
    def _fits(self) -> LtxConfig:
        if self.in_channels != self.out_channels:
            raise wrong(
                f"in_channels = {self.in_channels}, out_channels = {self.out_channels}: expected equal numbers: the"
                " velocity has the shape of the latents"
            )
        width = self.num_attention_heads * self.attention_head_dim
        if self.cross_attention_dim != width or width % 6 % 2:
            raise wrong(
                f"cross_attention_dim = {self.cross_attention_dim}, num_attention_heads * attention_head_dim = {width}:"
                " expected equal even numbers: captions are projected to the network's width"
            )
        return self


class Section(ModelSection):
    """`model` section of the LTX-Video family.

    `config` describes the network: without `pretrained` one of random weights, beside it the one that the folder must
    hold. `frame_rate`, in frames per second, is what the pipeline's key of that name is; rotary angles depend on it.
    `causal_positions`: whether they count the first latent frame as one video frame, as from 0.9.5 on; by default the
    pretrained pipeline's model_index.json decides.
    """

    family: Literal["ltx"] = "ltx"
    text_tokens: int = Field(default=_TEXT_TOKENS, ge=1)
    config: LtxConfig | None = None
    frame_rate: float = Field(default=25.0, gt=0)
    causal_positions: bool | None = None


def build(section: Section, pretrained: str | None, key: str) -> Ltx:
    """The family's `VideoModel` for one role; see `build_model`."""
    return build_model(Ltx, section, pretrained, key)


def architecture(section: Section, pretrained: str | None, key: str) -> Ltx:
    """As `build`, for what needs no weights; see `build_architecture`."""
    return build_architecture(Ltx, section, pretrained, key)


class Ltx(DiffusersModel):
    """An LTX-Video transformer; see `sgmd_dist.models.base.VideoModel`."""

    network = LTXVideoTransformer3DModel
    config_section = LtxConfig
    pipeline = "LTXPipeline"
    lora_loader = LTXVideoLoraLoaderMixin
    lora_layers = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    vae_strides = {128: (_TEMPORAL_STRIDE, _SPATIAL_STRIDE)}  # noqa: RUF012 (a constant)
    text_encoding: TextEncoding = TextEncoding(_TEXT_TOKENS, is_masked=False, is_cleaned=False)
    splits_sequences = True
    scheduler_call: SchedulerCall | None = "sigmas"

    def __init__(
        self, section: ModelSection, config: dict[str, Any], folder: Path | None, weight_files: list[Path]
    ) -> None:
        super().__init__(section, config, folder, weight_files)
        self.is_causal = _is_causal(cast(Section, section), folder)
        if self.is_causal:
            self.text_encoding = replace(self.text_encoding, max_tokens=_CAUSAL_TEXT_TOKENS)
            self.scheduler_call = None  # this pipeline walks times of its own unless its caller names others

    def attach(self, module: nn.Module, axis: SequenceAxis) -> None:
        attach(module, axis)

    def text_dim(self) -> int:
        return self.config["caption_channels"]

    def velocity(
        self, module: nn.Module, latents: Tensor, sigma: Tensor, condition: Condition, level: float | None = None
    ) -> Tensor:
        text, (frames, height, width) = text_of(condition), latents.shape[2:]
        output = module(
            hidden_states=latents.to(self.compute_dtype).flatten(2).mT,
            encoder_hidden_states=text.to(self.compute_dtype),
            timestep=sigma.to(torch.float32) * NUM_TRAIN_TIMESTEPS,
            encoder_attention_mask=text_mask(text),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=self._units(),
            video_coords=self._causal_places(latents) if self.is_causal else None,
            return_dict=False,
        )[0]
        tokens = output.to(torch.promote_types(output.dtype, torch.float32))
        return tokens.mT.unflatten(2, (frames, height, width))

    def _units(self) -> tuple[float, float, float]:
        """Seconds and pixels of a latent."""
        section = cast(Section, self.section)
        return _TEMPORAL_STRIDE / section.frame_rate, _SPATIAL_STRIDE, _SPATIAL_STRIDE

    def _causal_places(self, latents: Tensor) -> Tensor:
        """`[B, 3, L]` float32: seconds and pixels at which the tokens of `[B, C, F, H, W]` begin, the first latent
        frame being one of the video."""
        sizes = (torch.arange(size, dtype=torch.float32, device=latents.device) for size in latents.shape[2:])
        frames, rows, columns = (x.flatten() for x in torch.meshgrid(*sizes, indexing="ij"))
        frames = (_TEMPORAL_STRIDE * frames + 1 - _TEMPORAL_STRIDE).clamp(min=0)
        seconds = frames / cast(Section, self.section).frame_rate
        places = torch.stack([seconds, _SPATIAL_STRIDE * rows, _SPATIAL_STRIDE * columns])
        return places.expand(len(latents), -1, -1)


def _is_causal(section: Section, folder: Path | None) -> bool:
    """What the recipe says, or else the pipeline that the folder lies in, or `model.pretrained` for one outside."""
    if section.causal_positions is not None:
        return section.causal_positions
    pretrained = None if section.pretrained is None else Path(section.pretrained)
    places = [place for place in (folder and folder.parent, pretrained, pretrained and pretrained.parent) if place]
    found = next((path for place in places if (path := place / _INDEX).is_file()), None)
    return found is not None and read_object(found, "model.causal_positions").get("_class_name") == _CAUSAL_PIPELINE
