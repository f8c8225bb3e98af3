"""The Wan family on diffusers' `WanTransformer3DModel`: 2.1 T2V 1.3B and 14B, 2.2 TI2V-5B."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from pydantic import Field, model_validator
from torch import Tensor, nn

from sgmd_dist import rng
from sgmd_dist.errors import UserError
from sgmd_dist.flow import NUM_TRAIN_TIMESTEPS
from sgmd_dist.models.base import LatentShape
from sgmd_dist.recipe import ModelSection
from sgmd_dist.recipe import Section as RecipeSection

_VAE_TEMPORAL_STRIDE = 4
_VAE_SPATIAL_STRIDE = {16: 8, 48: 16}  # latent channels -> pixels per latent: Wan2.1's VAE and Wan2.2's
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class WanConfig(RecipeSection):
    """Arguments of diffusers' `WanTransformer3DModel`, for a network that starts from random weights."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = Field(12, ge=1)
    attention_head_dim: int = Field(128, ge=6)
    in_channels: int = Field(16, ge=1)
    out_channels: int = Field(16, ge=1)
    text_dim: int = Field(4096, ge=1)
    freq_dim: int = Field(256, ge=2)
    ffn_dim: int = Field(8960, ge=1)
    num_layers: int = Field(30, ge=1)
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = Field(1e-6, gt=0)
    rope_max_seq_len: int = Field(1024, ge=1)

    @model_validator(mode="after")
    def _even_head_dim(self) -> WanConfig:
        if self.attention_head_dim % 2:
            raise ValueError(f"attention_head_dim = {self.attention_head_dim}: rotary embedding needs an even number")
        return self


class Section(ModelSection):
    """`model` section of the Wan family.

    `config` describes the network when there is no `pretrained` folder. `expand_timesteps` hands the network one
    timestep per token (Wan2.2 TI2V-5B); by default the pretrained pipeline's model_index.json decides.
    """

    family: Literal["wan"] = "wan"
    config: WanConfig | None = None
    expand_timesteps: bool | None = None


def build(section: Section, pretrained: str | None, key: str) -> Wan:
    """The family's `VideoModel` for one role.

    Args:
        section: the recipe's `model` section.
        pretrained: local diffusers folder (pipeline or transformer), or None for random weights.
        key: the recipe key that gave `pretrained`, for messages.

    Raises:
        UserError: the folder is missing or holds no Wan transformer, or neither folder nor config is given.
    """
    compute_dtype = _DTYPES[section.compute_dtype]
    if pretrained is None:
        if section.config is None:
            raise UserError(f"{key}: neither {key} nor model.config is set; give a diffusers folder or a config")
        return Wan(section.config.model_dump(), None, bool(section.expand_timesteps), compute_dtype)
    folder, config = _read_config(Path(pretrained), key)
    expand = section.expand_timesteps
    if expand is None:
        expand = _pipeline_expands_timesteps(folder.parent)
    return Wan(config, folder, expand, compute_dtype)


class Wan:
    """A Wan transformer's architecture and conventions; see `sgmd_dist.models.base.VideoModel`."""

    def __init__(
        self, config: dict[str, Any], folder: Path | None, expand_timesteps: bool, compute_dtype: torch.dtype
    ) -> None:
        self.config = config
        self.folder = folder
        self.expand_timesteps = expand_timesteps
        self.compute_dtype = compute_dtype

    def build(self) -> nn.Module:
        return cast(nn.Module, WanTransformer3DModel.from_config(self.config))

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return list(module.blocks)  # pyright: ignore[reportArgumentType]

    def reset_buffers(self, module: nn.Module) -> None:
        head_dim, patch_size = self.config["attention_head_dim"], self.config["patch_size"]
        rope = WanRotaryPosEmbed(head_dim, patch_size, self.config["rope_max_seq_len"])
        module.rope = rope.to(next(module.parameters()).device)

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Xavier-uniform weights, zero biases and output projection, unit norms; embedders of time at std 0.02."""
        if "scale_shift_table" in name:
            return rng.normal(shape, seed, f"init/{name}") / shape[-1] ** 0.5
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        if name.startswith("proj_out"):
            return torch.zeros(shape)
        if "time_embedder" in name or "text_embedder" in name:
            return rng.normal(shape, seed, f"init/{name}") * 0.02
        fan_out, fan_in = shape[0], math.prod(shape[1:])
        return rng.normal(shape, seed, f"init/{name}") * (2 / (fan_in + fan_out)) ** 0.5

    def weight_files(self) -> list[Path]:
        if self.folder is None:
            return []
        index = self.folder / "diffusion_pytorch_model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [self.folder / name for name in names]
        return sorted(self.folder.glob("*.safetensors"))

    def velocity(self, module: nn.Module, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
        output = module(
            hidden_states=latents.to(self.compute_dtype),
            timestep=self._timestep(latents, sigma),
            encoder_hidden_states=prompt_embeds.to(self.compute_dtype),
            return_dict=False,
        )[0]
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _timestep(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """1000 sigma in float32, `[B]` or, per token, `[B, L]`: bfloat16 would round 987.3 to 988."""
        timestep = sigma.to(torch.float32) * NUM_TRAIN_TIMESTEPS
        if not self.expand_timesteps:
            return timestep
        sizes = zip(latents.shape[2:], self.config["patch_size"], strict=True)
        return timestep[:, None].expand(-1, math.prod(size // patch for size, patch in sizes))

    def latent_shape(self, num_frames: int, height: int, width: int) -> LatentShape:
        channels = self.config["in_channels"]
        stride = _VAE_SPATIAL_STRIDE.get(channels, 1)
        if stride == 1:
            return channels, num_frames, height, width
        return channels, (num_frames - 1) // _VAE_TEMPORAL_STRIDE + 1, height // stride, width // stride

    def smallest_latents(self) -> LatentShape:
        return (self.config["in_channels"], *self.config["patch_size"])

    def text_dim(self) -> int:
        return self.config["text_dim"]

    def export(self, state_dict: dict[str, Tensor], folder: Path) -> None:
        with torch.device("meta"):
            module = cast(WanTransformer3DModel, self.build())
        module.load_state_dict(state_dict, assign=True)
        module.save_pretrained(folder)

    def read_export(self, folder: Path) -> dict[str, Tensor]:
        return cast(nn.Module, WanTransformer3DModel.from_pretrained(folder, local_files_only=True)).state_dict()


def _read_config(pretrained: Path, key: str) -> tuple[Path, dict[str, Any]]:
    if not pretrained.is_dir():
        raise UserError(
            f"{key} = '{pretrained}': no such folder (working directory {Path.cwd()}); download the model's diffusers"
            f" folder there, or set {key}=PATH"
        )
    folder = pretrained / "transformer" if (pretrained / "transformer").is_dir() else pretrained
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{key} = '{pretrained}': no {path}; expected a diffusers pipeline or transformer") from None
    except ValueError as error:
        raise UserError(f"{key} = '{pretrained}': {path} is not valid JSON: {error}") from None
    name = config.get("_class_name")
    if name != WanTransformer3DModel.__name__:
        raise UserError(f"{key} = '{pretrained}': {path} describes {name}, expected {WanTransformer3DModel.__name__}")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{key} = '{pretrained}': {folder} holds no *.safetensors weights; download them too")
    parameters = inspect.signature(WanTransformer3DModel.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}  # older files lack newer keys
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")}
    return folder, {**defaults, **given}


def _pipeline_expands_timesteps(pipeline: Path) -> bool:
    index = pipeline / "model_index.json"
    return bool(json.loads(index.read_text()).get("expand_timesteps")) if index.exists() else False
