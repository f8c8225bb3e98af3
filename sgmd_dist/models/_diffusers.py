"""What families share whose model is one diffusers transformer: folders, weights, files. See `base.VideoModel`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from sgmd_dist import rng
from sgmd_dist.errors import UserError
from sgmd_dist.models._folder import checked, read_config, refuse_other, transformer_folder, weight_files
from sgmd_dist.models._strides import num_latents
from sgmd_dist.models._traced_costs import traced_costs
from sgmd_dist.models.base import (
    MAX_SHARD_SIZE,
    AttentionShape,
    ImageInput,
    LatentShape,
    PassCosts,
    PassShape,
    SchedulerCall,
    SequenceAxis,
    TextEncoding,
)
from sgmd_dist.recipe import ModelSection
from sgmd_dist.section import Section as RecipeSection


class DiffusersModel:
    """A transformer's architecture and the conventions of its pipeline. A family's class adds `velocity`.

    Class attributes of a family:
        network: its diffusers class.
        config_section: the recipe's section of the constructor's arguments that decide shapes.
        pipeline: the name of its pipeline's class.
        lora_loader: diffusers' mixin that writes and reads its adapters.
        lora_layers: the linear layers of a block that adapters may hang on.
        vae_strides: latent channels -> frames and pixels per latent of the VAE that makes them; others have none.
        text_encoding: how its pipeline makes embeddings of captions; None where that is not built.
    """

    network: ClassVar[Any]
    config_section: ClassVar[type[RecipeSection]]
    pipeline: ClassVar[str]
    lora_loader: ClassVar[Any]
    lora_layers: ClassVar[tuple[str, ...]]
    vae_strides: ClassVar[Mapping[int, tuple[int, int]]]

    boundaries: tuple[float, ...] = ()
    image_input: ImageInput | None = None
    text_encoding: TextEncoding | None = None
    splits_sequences: bool = False
    has_fused_blocks: bool = False
    scheduler_call: SchedulerCall | None = None

    def __init__(
        self, section: ModelSection, config: dict[str, Any], folder: Path | None, weight_files: list[Path]
    ) -> None:
        self.section = section
        self.config = config
        self.folder = folder
        self.compute_dtype: torch.dtype = getattr(torch, section.compute_dtype)
        self._weight_files = weight_files

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.config["out_channels"]

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, height and width of a token."""
        return self.config.get("patch_size_t") or 1, self.config["patch_size"], self.config["patch_size"]

    def build(self) -> nn.Module:
        return cast(nn.Module, self.network.from_config(self.config))

    def networks(self, module: nn.Module) -> list[nn.Module]:
        return [module]

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return list(network.transformer_blocks)  # pyright: ignore[reportArgumentType]

    def attach(self, module: nn.Module, axis: SequenceAxis) -> None:
        raise NotImplementedError

    def fuse(self, module: nn.Module) -> None:
        raise AssertionError("has_fused_blocks says that there are none")

    def lora_targets(self) -> tuple[str, ...]:
        return self.lora_layers

    def attention_shape(self) -> AttentionShape:
        config = self.config
        return AttentionShape(config["num_layers"], config["num_attention_heads"], config["attention_head_dim"])

    def num_tokens(self, latent_shape: LatentShape) -> int:
        return math.prod(size // unit for size, unit in zip(latent_shape[1:], self.patch, strict=True))

    def pass_costs(self, shape: PassShape) -> PassCosts:
        return traced_costs(self, shape)

    def with_blocks(self, count: int) -> DiffusersModel:
        """The same architecture with another number of blocks."""
        other = copy.copy(self)
        other.config = {**self.config, "num_layers": count}
        return other

    def reset_buffers(self, module: nn.Module, device: torch.device) -> None:
        assert not dict(module.named_buffers()), "a family whose network has buffers recomputes them"

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Normal weights of Xavier's variance, zero biases and output projection, unit norms; modulation tables have
        std 1/sqrt(width)."""
        if "scale_shift_table" in name:
            return rng.normal(shape, seed, f"init/{name}") / shape[-1] ** 0.5
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        if name.startswith("proj_out"):
            return torch.zeros(shape)
        fan_out, fan_in = shape[0], math.prod(shape[1:])
        return rng.normal(shape, seed, f"init/{name}") * (2 / (fan_in + fan_out)) ** 0.5

    def weight_files(self) -> dict[str, list[Path]]:
        return {"": self._weight_files} if self._weight_files else {}

    def latent_shape(self, num_frames: int, height: int, width: int) -> LatentShape:
        temporal, spatial = self.vae_strides.get(self.channels, (1, 1))
        patch = self.patch
        return (
            self.channels,
            num_latents("num_frames", num_frames, temporal, patch[0], lone_first=True),
            num_latents("height", height, spatial, patch[1]),
            num_latents("width", width, spatial, patch[2]),
        )

    def text_dim(self) -> int:
        raise NotImplementedError

    def smallest_latents(self) -> LatentShape:
        return (self.channels, *self.patch)

    def export(self, state_dict: dict[str, Tensor], folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        with torch.device("meta"):
            module: Any = self.build()
        module.load_state_dict(state_dict, assign=True)
        module.save_pretrained(folder, max_shard_size=max_shard_size)

    def read_export(self, folder: Path) -> dict[str, Tensor]:
        return cast(nn.Module, self.network.from_pretrained(folder, local_files_only=True)).state_dict()

    def export_parts(
        self, state_dict: dict[str, Tensor], folder: Path, max_shard_size: str = MAX_SHARD_SIZE
    ) -> dict[str, Any]:
        self.export(state_dict, folder / "transformer", max_shard_size)
        return {"_class_name": self.pipeline, "transformer": ["diffusers", self.network.__name__]}

    def read_parts(self, folder: Path) -> dict[str, Tensor]:
        return self.read_export(folder / "transformer")

    def export_adapter(self, weights: dict[str, Tensor], facts: dict[str, Any], folder: Path) -> None:
        self.lora_loader.save_lora_weights(
            str(folder), transformer_lora_layers=dict(weights), transformer_lora_adapter_metadata=facts
        )

    def read_adapter(self, folder: Path) -> dict[str, Tensor]:
        found = self.lora_loader.lora_state_dict(str(folder), use_safetensors=True, local_files_only=True)
        return {name.removeprefix("transformer."): tensor for name, tensor in found.items()}


Model = TypeVar("Model", bound=DiffusersModel)


def build_model(family: type[Model], section: ModelSection, pretrained: str | None, key: str) -> Model:
    """A family's `VideoModel` for one role.

    Args:
        family: its class.
        section: the recipe's `model` section, with a `config` of the family.
        pretrained: local diffusers folder (pipeline or transformer), or None for random weights.
        key: the recipe key that gave `pretrained`, for messages.

    Raises:
        UserError: the folder is missing, incomplete, of another kind of model or not what `model.config` says, or there
            is neither folder nor config.
    """
    described = _described(section)
    if pretrained is None:
        if described is None:
            raise UserError(f"{key}: neither {key} nor model.config is set; give a diffusers folder or a config")
        return family(section, described.model_dump(), None, [])
    folder, said = transformer_folder(Path(pretrained), key), f"{key} = '{pretrained}'"
    config = read_config(folder, family.network, said)
    where = f"{said}: {folder / 'config.json'}"
    values = checked(config, family.config_section, where)
    if described is not None and pretrained == section.pretrained:
        refuse_other(values, described.model_dump(), where)
    return family(section, {**config, **values}, folder, weight_files(folder, said))


def build_architecture(family: type[Model], section: ModelSection, pretrained: str | None, key: str) -> Model:
    """As `build_model`, for what needs no weights: where the folder is not there, `model.config` tells.

    Raises:
        UserError: as `build_model`; for a missing folder only where there is no config beside it.
    """
    is_described = _described(section) is not None and pretrained == section.pretrained
    if is_described and pretrained is not None and not Path(pretrained).is_dir():
        return build_model(family, section, None, key)
    return build_model(family, section, pretrained, key)


def _described(section: ModelSection) -> RecipeSection | None:
    return getattr(section, "config")  # noqa: B009 (each family's section has one, of its own type)
