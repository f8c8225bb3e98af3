"""The CogVideoX family on diffusers' `CogVideoXTransformer3DModel`, text to video: 2B, 5B and 1.5-5B.

A diffusion with v-prediction: `_variance_preserving` makes of it the velocity that the rest of the project speaks of.
Text and video are one sequence, the text's padding included: prompts have one length.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad

from sgmd_dist.conditions import Condition, text_of
from sgmd_dist.errors import UserError
from sgmd_dist.models._cogvideox_attention import Rotary, attach
from sgmd_dist.models._diffusers import DiffusersModel, build_architecture, build_model
from sgmd_dist.models._folder import read_object
from sgmd_dist.models._variance_preserving import flow_velocity, noise_levels
from sgmd_dist.models.base import SequenceAxis, TextEncoding
from sgmd_dist.recipe import ModelSection, wrong
from sgmd_dist.recipe import Section as RecipeSection

NETWORK = CogVideoXTransformer3DModel

_SCHEDULER = Path("scheduler", "scheduler_config.json")
_SCHEDULERS = {kind.__name__: kind for kind in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)}  # of one diffusion


class CogVideoXConfig(RecipeSection):
    """Arguments of diffusers' `CogVideoXTransformer3DModel`. Its `sample_` sizes are those that it was trained on."""

    num_attention_heads: int = Field(48, ge=1)
    attention_head_dim: int = Field(64, ge=4)
    in_channels: int = Field(16, ge=1)
    out_channels: int = Field(16, ge=1)
    time_embed_dim: int = Field(512, ge=1)
    ofs_embed_dim: Literal[None] = None
    text_embed_dim: int = Field(4096, ge=1)
    num_layers: int = Field(42, ge=1)
    attention_bias: bool = True
    sample_width: int = Field(90, ge=1)
    sample_height: int = Field(60, ge=1)
    sample_frames: int = Field(49, ge=1)
    patch_size: int = Field(2, ge=1)
    patch_size_t: int | None = Field(None, ge=1)
    temporal_compression_ratio: int = Field(4, ge=1)
    max_text_seq_length: int = Field(226, ge=1)
    norm_elementwise_affine: bool = True
    norm_eps: float = Field(1e-5, gt=0)
    spatial_interpolation_scale: float = Field(1.875, gt=0)
    temporal_interpolation_scale: float = Field(1.0, gt=0)
    use_rotary_positional_embeddings: bool = True
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    @model_validator(mode="after")
    def _fits(self) -> CogVideoXConfig:
        if self.in_channels != self.out_channels:
            raise wrong(
                f"in_channels = {self.in_channels}, out_channels = {self.out_channels}: expected equal numbers: the"
                " velocity has the shape of the latents, and image-to-video models are not built"
            )
        if self.use_learned_positional_embeddings:
            raise wrong("use_learned_positional_embeddings = true: only image-to-video models have them")
        key, size = "attention_head_dim", self.attention_head_dim
        if not self.use_rotary_positional_embeddings:
            key, size = "num_attention_heads * attention_head_dim", self.num_attention_heads * size
        if size % 16:
            raise wrong(f"{key} = {size}: expected a multiple of 16: a quarter of it is for time, the rest for space")
        return self


class NoiseSchedule(RecipeSection):
    """The diffusion that a network was trained on: arguments of diffusers' `CogVideoXDDIMScheduler`."""

    num_train_timesteps: int = Field(1000, ge=2)
    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    trained_betas: Literal[None] = None
    prediction_type: Literal["v_prediction"] = "v_prediction"
    rescale_betas_zero_snr: bool = True
    snr_shift_scale: float = Field(1.0, gt=0)

    def levels(self) -> list[float]:
        """The rectified flow's sigma of each timestep."""
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        steps = np.linspace(self.beta_start**power, self.beta_end**power, self.num_train_timesteps)
        return noise_levels(
            steps ** (1 / power),
            snr_shift_scale=self.snr_shift_scale,
            rescale_betas_zero_snr=self.rescale_betas_zero_snr,
        )


class Section(ModelSection):
    """`model` section of the CogVideoX family.

    `config` describes the network: without `pretrained` one of random weights, beside it the one that the folder must
    hold. `noise_schedule` takes the place of the pretrained pipeline's scheduler, and is needed for a folder without.
    """

    family: Literal["cogvideox"] = "cogvideox"
    text_tokens: int = Field(default=226, ge=1)
    config: CogVideoXConfig | None = None
    noise_schedule: NoiseSchedule | None = None


def build(section: Section, pretrained: str | None, key: str) -> CogVideoX:
    """The family's `VideoModel` for one role; see `build_model`."""
    return build_model(CogVideoX, section, pretrained, key)


def architecture(section: Section, pretrained: str | None, key: str) -> CogVideoX:
    """As `build`, for what needs no weights; see `build_architecture`."""
    return build_architecture(CogVideoX, section, pretrained, key)


class CogVideoX(DiffusersModel):
    """A CogVideoX transformer; see `sgmd_dist.models.base.VideoModel`."""

    network = CogVideoXTransformer3DModel
    config_section = CogVideoXConfig
    pipeline = "CogVideoXPipeline"
    lora_loader = CogVideoXLoraLoaderMixin
    lora_layers = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    vae_strides = {16: (4, 8)}  # noqa: RUF012 (a constant)

    def __init__(
        self, section: ModelSection, config: dict[str, Any], folder: Path | None, weight_files: list[Path]
    ) -> None:
        super().__init__(section, config, folder, weight_files)
        tokens = config["max_text_seq_length"]
        self.text_encoding = TextEncoding(tokens, is_masked=False, keeps_padding=True, is_cleaned=False)
        self.levels = _noise_schedule(cast(Section, section).noise_schedule, folder).levels()

    def attach(self, module: nn.Module, axis: SequenceAxis) -> None:
        attach(module, axis)

    def reset_buffers(self, module: nn.Module, device: torch.device) -> None:
        embed: Any = module.get_submodule("patch_embed")
        if embed.use_positional_embeddings:
            sizes = (self.config[f"sample_{name}"] for name in ("height", "width", "frames"))
            embed.pos_embedding = embed._get_positional_embeddings(*sizes, device=device)

    def text_dim(self) -> int:
        return self.config["text_embed_dim"]

    def velocity(
        self, module: nn.Module, latents: Tensor, sigma: Tensor, condition: Condition, level: float | None = None
    ) -> Tensor:
        text = text_of(condition)
        if not self.config["use_rotary_positional_embeddings"]:  # positions count text of this length
            missing = self.config["max_text_seq_length"] - text.shape[1]
            text = pad(text, (0, 0, 0, max(missing, 0)))

        def predict(z: Tensor, timestep: Tensor) -> Tensor:
            output = module(
                hidden_states=z.to(self.compute_dtype).transpose(1, 2),
                encoder_hidden_states=text.to(self.compute_dtype),
                timestep=timestep,
                image_rotary_emb=self._rotary(z),
                return_dict=False,
            )[0]
            return output.transpose(1, 2).to(z.dtype)

        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return flow_velocity(predict, wide, sigma.to(wide.dtype), self.levels)

    def _rotary(self, latents: Tensor) -> Rotary | None:
        """cos and sin `[L, D]` of the pipeline."""
        config, (frames, height, width) = self.config, latents.shape[2:]
        if not config["use_rotary_positional_embeddings"]:
            return None
        patch, patch_t = config["patch_size"], config["patch_size_t"]
        grid, trained = (height // patch, width // patch), [config[f"sample_{n}"] // patch for n in ("height", "width")]
        if patch_t is None:
            crops = get_resize_crop_region_for_grid(grid, trained[1], trained[0])
            how: dict[str, Any] = {"crops_coords": crops, "temporal_size": frames}
        else:
            how = {"crops_coords": None, "temporal_size": -(-frames // patch_t), "grid_type": "slice"}
            how["max_size"] = tuple(trained)
        size = config["attention_head_dim"]
        return cast(Rotary, get_3d_rotary_pos_embed(size, grid_size=grid, device=latents.device, **how))


def _noise_schedule(chosen: NoiseSchedule | None, folder: Path | None) -> NoiseSchedule:
    """The chosen one, or that of the pipeline that a transformer's folder lies in."""
    if chosen is not None or folder is None:
        return chosen or NoiseSchedule.model_validate({})
    path = folder.parent / _SCHEDULER
    if not path.is_file():
        raise UserError(
            f"{path}: not found; give a pipeline's folder with its scheduler, or set model.noise_schedule to the"
            " diffusion that the network was trained on, as {snr_shift_scale: 1.0} for 5B and {snr_shift_scale: 3.0}"
            " for 2B"
        )
    config = read_object(path, "model.noise_schedule")
    name = config.get("_class_name")
    if name not in _SCHEDULERS:
        raise UserError(
            f"{path}: describes {name}, expected {' or '.join(_SCHEDULERS)}; set model.noise_schedule instead"
        )
    # What a file lacks has the scheduler's defaults, which are not those of `NoiseSchedule`.
    defaults = {p.name: p.default for p in inspect.signature(_SCHEDULERS[name].__init__).parameters.values()}
    try:
        return NoiseSchedule.model_validate({k: config.get(k, defaults[k]) for k in NoiseSchedule.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {name} = {first['input']!r}: {first['msg']}; set model.noise_schedule") from None
