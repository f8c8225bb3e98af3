"""The Wan family on diffusers' `WanTransformer3DModel`: 2.1 T2V and I2V, 2.2 TI2V-5B, T2V-A14B and I2V-A14B."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from sgmd_dist import rng
from sgmd_dist.conditions import Condition
from sgmd_dist.errors import UserError
from sgmd_dist.flow import NUM_TRAIN_TIMESTEPS
from sgmd_dist.models._folder import checked, refuse_other
from sgmd_dist.models._strides import num_latents
from sgmd_dist.models._wan_attention import attach
from sgmd_dist.models._wan_costs import pass_costs
from sgmd_dist.models._wan_experts import WanExperts
from sgmd_dist.models._wan_folder import read_folder
from sgmd_dist.models._wan_fused import fuse
from sgmd_dist.models._wan_image import TEXT_TOKENS, image_input_of, network_inputs, wrong_channels
from sgmd_dist.models._wan_original import (
    read_original,
    read_original_adapter,
    write_original,
    write_original_adapter,
)
from sgmd_dist.models.base import (
    MAX_SHARD_SIZE,
    TEXT_ENCODING,
    AttentionShape,
    LatentShape,
    PassCosts,
    PassShape,
    SchedulerCall,
    SequenceAxis,
    TextEncoding,
)
from sgmd_dist.recipe import ModelSection, wrong
from sgmd_dist.recipe import Section as RecipeSection

NETWORK = WanTransformer3DModel

_VAE_TEMPORAL_STRIDE = 4
_VAE_SPATIAL_STRIDE = {16: 8, 48: 16}  # latent channels -> pixels per latent: Wan2.1's VAE and Wan2.2's
_IMAGE_LORA_TARGETS = ("add_k_proj", "add_v_proj")
_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")  # of both attentions


class WanConfig(RecipeSection):
    """Arguments of diffusers' `WanTransformer3DModel`. `out_channels` are the latents'; image-to-video networks have
    2 `out_channels` + 4 `in_channels`, and those with an image encoder the two keys that end with `dim`."""

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
    qk_norm: Literal["rms_norm_across_heads"] | None = "rms_norm_across_heads"
    eps: float = Field(1e-6, gt=0)
    image_dim: int | None = Field(None, ge=1)
    added_kv_proj_dim: int | None = Field(None, ge=1)
    rope_max_seq_len: int = Field(1024, ge=1)

    @field_validator("patch_size")
    @classmethod
    def _positive(cls, patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
        if min(patch_size) < 1:
            raise wrong("expected three integers >= 1: frames, height and width of a patch")
        return patch_size

    @field_validator("attention_head_dim")
    @classmethod
    def _even(cls, attention_head_dim: int) -> int:
        if attention_head_dim % 2:
            raise wrong("expected an even integer >= 6: rotary embedding turns pairs of numbers")
        return attention_head_dim

    @model_validator(mode="after")
    def _known_channels(self) -> WanConfig:
        if found := wrong_channels(self.model_dump()):
            raise wrong(found)
        return self


class Section(ModelSection):
    """`model` section of the Wan family.

    `config` describes the network: without `pretrained` one of random weights, beside it the one that the folder must
    hold, so that a run can be planned on a machine without the folder. `expand_timesteps` hands the network one
    timestep per token (Wan2.2 TI2V-5B); by default the pretrained pipeline's model_index.json decides.
    It also decides on `boundary_ratio`, the noise level that parts the two transformers of Wan2.2-A14B; without a
    folder a number makes two of them.
    """

    family: Literal["wan"] = "wan"
    config: WanConfig | None = None
    expand_timesteps: bool | None = None
    boundary_ratio: float | None = Field(None, gt=0, lt=1)


def build(section: Section, pretrained: str | None, key: str) -> Wan | WanExperts:
    """The family's `VideoModel` for one role.

    Args:
        section: the recipe's `model` section.
        pretrained: local diffusers folder (pipeline or transformer), or None for random weights.
        key: the recipe key that gave `pretrained`, for messages.

    Raises:
        UserError: the folder is missing, incomplete, of another kind of model or not what `model.config` says, or there
            is neither folder nor config.
    """
    dtype = getattr(torch, section.compute_dtype)
    if pretrained is None:
        if section.config is None:
            raise UserError(f"{key}: neither {key} nor model.config is set; give a diffusers folder or a config")
        wan = Wan(section.config.model_dump(), None, [], bool(section.expand_timesteps), dtype)
        _check_text_tokens(wan, section)
        boundary = section.boundary_ratio
        return wan if boundary is None else WanExperts(wan, {}, boundary, wan.expand_timesteps)
    found = read_folder(Path(pretrained), key, section.boundary_ratio)
    expand = found.expand_timesteps if section.expand_timesteps is None else section.expand_timesteps
    where = f"{key} = '{pretrained}': {found.path / 'config.json'}"
    values = checked(found.config, WanConfig, where)
    if section.config is not None and pretrained == section.pretrained:
        refuse_other(values, section.config.model_dump(), where)
    wan = Wan({**found.config, **values}, found.path, found.weight_files, expand, dtype)
    _check_text_tokens(wan, section)
    if found.boundary_ratio is None:
        return wan
    files = {"high": found.weight_files, "low": found.low_noise_files}
    return WanExperts(wan, files, found.boundary_ratio, expand)


def architecture(section: Section, pretrained: str | None, key: str) -> Wan | WanExperts:
    """As `build`, for what needs no weights: where the folder is not there, `model.config` says what it would hold.

    Raises:
        UserError: as `build`; for a missing folder only where there is no config beside it.
    """
    is_described = section.config is not None and pretrained == section.pretrained
    if is_described and pretrained is not None and not Path(pretrained).is_dir():
        return build(section, None, key)
    return build(section, pretrained, key)


def _check_text_tokens(wan: Wan, section: Section) -> None:
    image = wan.image_input
    if image is not None and image.embed_dim and section.text_tokens > TEXT_TOKENS:
        raise UserError(
            f"model.text_tokens = {section.text_tokens}: expected at most {TEXT_TOKENS}: before so many tokens a"
            " network with image embeddings expects those of the image; shorter texts are filled up with zeros"
        )


class Wan:
    """A Wan transformer's architecture and conventions; see `sgmd_dist.models.base.VideoModel`."""

    boundaries: tuple[float, ...] = ()
    splits_sequences: bool = True
    has_fused_blocks: bool = True
    text_encoding: TextEncoding | None = TEXT_ENCODING
    scheduler_call: SchedulerCall | None = "steps"

    def __init__(
        self,
        config: dict[str, Any],
        folder: Path | None,
        weight_files: list[Path],
        expand_timesteps: bool,
        compute_dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.folder = folder
        self._weight_files = weight_files
        self.expand_timesteps = expand_timesteps
        self.compute_dtype = compute_dtype
        self.image_input = image_input_of(config)

    def build(self) -> nn.Module:
        return cast(nn.Module, WanTransformer3DModel.from_config(self.config))

    def networks(self, module: nn.Module) -> list[nn.Module]:
        return [module]

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return list(network.blocks)  # pyright: ignore[reportArgumentType]

    def attach(self, module: nn.Module, axis: SequenceAxis) -> None:
        attach(module, axis)

    def fuse(self, module: nn.Module) -> None:
        fuse(module)

    def lora_targets(self) -> tuple[str, ...]:
        has_embeds = self.image_input is not None and self.image_input.embed_dim > 0
        return _LORA_TARGETS + _IMAGE_LORA_TARGETS if has_embeds else _LORA_TARGETS

    def attention_shape(self) -> AttentionShape:
        config = self.config
        return AttentionShape(config["num_layers"], config["num_attention_heads"], config["attention_head_dim"])

    def num_tokens(self, latent_shape: LatentShape) -> int:
        sizes = zip(latent_shape[1:], self.config["patch_size"], strict=True)
        return math.prod(size // patch for size, patch in sizes)

    def pass_costs(self, shape: PassShape) -> PassCosts:
        return pass_costs(self.config, shape, per_token=self.expand_timesteps, item_bytes=self.compute_dtype.itemsize)

    def reset_buffers(self, module: nn.Module, device: torch.device) -> None:
        head_dim, patch_size = self.config["attention_head_dim"], self.config["patch_size"]
        fresh = WanRotaryPosEmbed(head_dim, patch_size, self.config["rope_max_seq_len"])
        for name, buffer in fresh.named_buffers():  # the module itself stays: hooks hang on it
            setattr(module.rope, name, buffer.to(device))

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Wan's own: normal weights of Xavier's variance, zero biases and output projection, unit norms.

        The embedders of time and text have std 0.02, the modulation tables 1/sqrt(width).
        """
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

    def weight_files(self) -> dict[str, list[Path]]:
        return {"": self._weight_files} if self._weight_files else {}

    def velocity(
        self, module: nn.Module, latents: Tensor, sigma: Tensor, condition: Condition, level: float | None = None
    ) -> Tensor:
        inputs = network_inputs(self.image_input, latents.to(self.compute_dtype), condition)
        output = module(**inputs, timestep=self._timestep(latents, sigma), return_dict=False)[0]
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _timestep(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """1000 sigma in float32, `[B]` or, per token, `[B, L]`: bfloat16 would round 987.3 to 988."""
        timestep = sigma.to(torch.float32) * NUM_TRAIN_TIMESTEPS
        if not self.expand_timesteps:
            return timestep
        return timestep[:, None].expand(-1, self.num_tokens(cast(LatentShape, tuple(latents.shape[1:]))))

    def latent_shape(self, num_frames: int, height: int, width: int) -> LatentShape:
        channels, patch = self.config["out_channels"], self.config["patch_size"]
        pixels = _VAE_SPATIAL_STRIDE.get(channels)
        frames = 1 if pixels is None else _VAE_TEMPORAL_STRIDE
        return (
            channels,
            num_latents("num_frames", num_frames, frames, patch[0], lone_first=True),
            num_latents("height", height, pixels or 1, patch[1]),
            num_latents("width", width, pixels or 1, patch[2]),
        )

    def smallest_latents(self) -> LatentShape:
        return (self.config["out_channels"], *self.config["patch_size"])

    def text_dim(self) -> int:
        return self.config["text_dim"]

    def export(self, state_dict: dict[str, Tensor], folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        with torch.device("meta"):
            module = cast(WanTransformer3DModel, self.build())
        module.load_state_dict(state_dict, assign=True)
        module.save_pretrained(folder, max_shard_size=max_shard_size)

    def read_export(self, folder: Path) -> dict[str, Tensor]:
        return cast(nn.Module, WanTransformer3DModel.from_pretrained(folder, local_files_only=True)).state_dict()

    def export_parts(
        self, state_dict: dict[str, Tensor], folder: Path, max_shard_size: str = MAX_SHARD_SIZE
    ) -> dict[str, Any]:
        self.export(state_dict, folder / "transformer", max_shard_size)
        return {
            "_class_name": "WanPipeline" if self.image_input is None else "WanImageToVideoPipeline",
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "transformer_2": [None, None],
            "boundary_ratio": None,
            "expand_timesteps": self.expand_timesteps,
        }

    def read_parts(self, folder: Path) -> dict[str, Tensor]:
        return self.read_export(folder / "transformer")

    def export_adapter(self, weights: dict[str, Tensor], facts: dict[str, Any], folder: Path) -> None:
        WanLoraLoaderMixin.save_lora_weights(
            str(folder), transformer_lora_layers=dict(weights), transformer_lora_adapter_metadata=facts
        )

    def read_adapter(self, folder: Path) -> dict[str, Tensor]:
        found = WanLoraLoaderMixin.lora_state_dict(str(folder), use_safetensors=True, local_files_only=True)
        return {name.removeprefix("transformer."): tensor for name, tensor in cast(dict[str, Tensor], found).items()}

    def export_original(self, state_dict: dict[str, Tensor], folder: Path) -> None:
        write_original(state_dict, folder / "model.safetensors")

    def read_original(self, folder: Path) -> dict[str, Tensor]:
        return read_original(folder / "model.safetensors")

    def export_original_adapter(self, weights: dict[str, Tensor], folder: Path) -> None:
        write_original_adapter(weights, folder / "lora.safetensors")

    def read_original_adapter(self, folder: Path) -> dict[str, Tensor]:
        return read_original_adapter(folder / "lora.safetensors")
