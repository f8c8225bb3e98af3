"""The HunyuanVideo-1.5 family on diffusers' `HunyuanVideo15Transformer3DModel`, text to video.

Beside the latents its network reads those of an image with their mask, zeros here. The second text encoder, for quoted
text, is not built: prompts with quotes are read as the first one has them.
"""

from __future__ import annotations

import inspect
from typing import Literal

import torch
from diffusers import HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel
from diffusers.loaders import HunyuanVideoLoraLoaderMixin
from pydantic import Field, model_validator
from torch import Tensor, nn

from sgmd_dist import rng
from sgmd_dist.flow import NUM_TRAIN_TIMESTEPS
from sgmd_dist.models._diffusers import DiffusersModel, build_architecture, build_model
from sgmd_dist.models._hunyuan_video_15_forward import attach
from sgmd_dist.models._text import text_mask
from sgmd_dist.models.base import Chat, SequenceAxis, TextEncoding
from sgmd_dist.recipe import ModelSection, wrong
from sgmd_dist.recipe import Section as RecipeSection

NETWORK = HunyuanVideo15Transformer3DModel


def _text_encoding() -> TextEncoding:
    """What its pipeline tells the language model, by the defaults of the method that does."""
    found = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    told = {name: parameter.default for name, parameter in found.items()}
    chat = Chat(told["system_message"], told["crop_start"], -1 - told["num_hidden_layers_to_skip"])
    return TextEncoding(told["tokenizer_max_length"], is_cleaned=False, chat=chat)


class HunyuanVideo15Config(RecipeSection):
    """Arguments of diffusers' `HunyuanVideo15Transformer3DModel`."""

    in_channels: int = Field(65, ge=3)
    out_channels: int = Field(32, ge=1)
    num_attention_heads: int = Field(16, ge=1)
    attention_head_dim: int = Field(128, ge=2)
    num_layers: int = Field(54, ge=1)
    num_refiner_layers: int = Field(2, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    patch_size: int = Field(1, ge=1)
    patch_size_t: int = Field(1, ge=1)
    qk_norm: Literal["rms_norm"] = "rms_norm"
    text_embed_dim: int = Field(3584, ge=1)
    text_embed_2_dim: int = Field(1472, ge=1)
    image_embed_dim: int = Field(1152, ge=1)
    rope_theta: float = Field(256.0, gt=0)
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    use_meanflow: bool = False

    @model_validator(mode="after")
    def _fits(self) -> HunyuanVideo15Config:
        if self.in_channels != 2 * self.out_channels + 1:
            raise wrong(
                f"in_channels = {self.in_channels}, out_channels = {self.out_channels}: expected 2 out_channels + 1:"
                " latents, an image's, and its mask"
            )
        if sum(self.rope_axes_dim) != self.attention_head_dim or any(size % 2 for size in self.rope_axes_dim):
            raise wrong(
                f"rope_axes_dim = {list(self.rope_axes_dim)}, attention_head_dim = {self.attention_head_dim}: expected"
                " three even numbers whose sum is the head size"
            )
        if self.use_meanflow:
            raise wrong("use_meanflow = true: a network of few steps with two timesteps cannot be trained here")
        return self


class Section(ModelSection):
    """`model` section of the HunyuanVideo-1.5 family.

    `config` describes the network: without `pretrained` one of random weights, beside it the one that the folder must
    hold.
    """

    family: Literal["hunyuan_video_15"] = "hunyuan_video_15"
    text_tokens: int = Field(default=1000, ge=1)
    config: HunyuanVideo15Config | None = None


def build(section: Section, pretrained: str | None, key: str) -> HunyuanVideo15:
    """The family's `VideoModel` for one role; see `build_model`."""
    return build_model(HunyuanVideo15, section, pretrained, key)


def architecture(section: Section, pretrained: str | None, key: str) -> HunyuanVideo15:
    """As `build`, for what needs no weights; see `build_architecture`."""
    return build_architecture(HunyuanVideo15, section, pretrained, key)


class HunyuanVideo15(DiffusersModel):
    """A HunyuanVideo-1.5 transformer; see `sgmd_dist.models.base.VideoModel`."""

    network = HunyuanVideo15Transformer3DModel
    config_section = HunyuanVideo15Config
    pipeline = "HunyuanVideo15Pipeline"
    lora_loader = HunyuanVideoLoraLoaderMixin  # the pipeline has none of its own; the network's takes its files
    lora_layers = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    vae_strides = {32: (4, 16)}  # noqa: RUF012 (a constant)
    text_encoding = _text_encoding()

    def attach(self, module: nn.Module, axis: SequenceAxis) -> None:
        attach(module, axis)

    def text_dim(self) -> int:
        return self.config["text_embed_dim"]

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """As other families'; the kinds of text have std 0.02."""
        if name.startswith("cond_type_embed"):
            return rng.normal(shape, seed, f"init/{name}") * 0.02
        return super().initial_value(name, shape, seed)

    def velocity(
        self, module: nn.Module, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, level: float | None = None
    ) -> Tensor:
        mask = text_mask(prompt_embeds)
        nothing = ~mask.any(1, keepdim=True) & (torch.arange(mask.shape[1], device=mask.device) == 0)
        own = latents.to(self.compute_dtype)
        condition = torch.zeros_like(own[:, :1]).expand(-1, self.config["out_channels"] + 1, -1, -1, -1)
        output = module(
            torch.cat([own, condition], 1),
            sigma.to(torch.float32) * NUM_TRAIN_TIMESTEPS,
            prompt_embeds.to(self.compute_dtype),
            mask | nothing,  # its mean over the text would divide by zero
        )[0]
        return output.to(torch.promote_types(output.dtype, torch.float32))
