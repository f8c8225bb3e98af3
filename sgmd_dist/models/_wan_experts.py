"""Two networks of one architecture by noise level as one model: Wan2.2-A14B.

As in diffusers' pipeline, `transformer` is the expert for noise levels from the boundary up, `transformer_2` for those
below. Their parameters are named `high.*` and `low.*`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sgmd_dist import flow, rng
from sgmd_dist.conditions import Condition
from sgmd_dist.models._wan_original import (
    read_original,
    read_original_adapter,
    write_original,
    write_original_adapter,
)
from sgmd_dist.models.base import (
    MAX_SHARD_SIZE,
    AttentionShape,
    LatentShape,
    PassCosts,
    PassShape,
    SchedulerCall,
    SequenceAxis,
    VideoModel,
)

FOLDERS = {"high": "transformer", "low": "transformer_2"}  # expert -> its folder in a pipeline's
INDEX = "model_index.json"
_CLASS = ["diffusers", "WanTransformer3DModel"]


class Experts(nn.Module):
    """The two networks. It has no parameters of its own and is never run: a forward pass runs one of them."""

    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.high = high
        self.low = low


class WanExperts:
    """A pair of Wan transformers; see `sgmd_dist.models.base.VideoModel`."""

    def __init__(
        self, expert: VideoModel, weight_files: dict[str, list[Path]], boundary_ratio: float, expand_timesteps: bool
    ) -> None:
        """
        Args:
            expert: the architecture of either expert.
            weight_files: of the experts `high` and `low`; empty for random weights.
            boundary_ratio: the noise level in (0, 1) from which the high-noise expert serves.
            expand_timesteps: what the pipeline of an export is to say of it.
        """
        self.expert = expert
        self.config = expert.config
        self.compute_dtype = expert.compute_dtype
        self.image_input = expert.image_input
        self.splits_sequences = expert.splits_sequences
        self.has_fused_blocks = expert.has_fused_blocks
        self.text_encoding = expert.text_encoding
        self.scheduler_call: SchedulerCall | None = expert.scheduler_call
        self.boundaries = (boundary_ratio,)
        self.boundary_ratio = boundary_ratio
        self.expand_timesteps = expand_timesteps
        self._weight_files = weight_files

    def build(self) -> nn.Module:
        return Experts(self.expert.build(), self.expert.build())

    def networks(self, module: nn.Module) -> list[nn.Module]:
        experts = cast(Experts, module)
        return [experts.low, experts.high]

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return self.expert.blocks(network)

    def attach(self, module: nn.Module, axis: SequenceAxis) -> None:
        for network in self.networks(module):
            self.expert.attach(network, axis)

    def fuse(self, module: nn.Module) -> None:
        for network in self.networks(module):
            self.expert.fuse(network)

    def lora_targets(self) -> tuple[str, ...]:
        return self.expert.lora_targets()

    def attention_shape(self) -> AttentionShape:
        return self.expert.attention_shape()

    def num_tokens(self, latent_shape: LatentShape) -> int:
        return self.expert.num_tokens(latent_shape)

    def pass_costs(self, shape: PassShape) -> PassCosts:
        return self.expert.pass_costs(shape)

    def reset_buffers(self, module: nn.Module, device: torch.device) -> None:
        for network in self.networks(module):
            self.expert.reset_buffers(network, device)

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """The experts' own, each with a seed of its own."""
        which, _, inner = name.partition(".")
        return self.expert.initial_value(inner, shape, rng.key(seed, f"init/{which}"))

    def weight_files(self) -> dict[str, list[Path]]:
        return {f"{which}.": files for which, files in self._weight_files.items()}

    def velocity(
        self, module: nn.Module, latents: Tensor, sigma: Tensor, condition: Condition, level: float | None = None
    ) -> Tensor:
        assert level is not None, "a model with experts chooses by the level"
        low, high = self.networks(module)
        is_high = flow.reaches(level, self.boundary_ratio)
        torch._assert_async(  # on the device: the host goes on
            ((sigma.float() >= self.boundary_ratio) == is_high).all(),
            f"noise levels of a batch lie on both sides of {self.boundary_ratio}",
        )
        return self.expert.velocity(high if is_high else low, latents, sigma, condition)

    def latent_shape(self, num_frames: int, height: int, width: int) -> LatentShape:
        return self.expert.latent_shape(num_frames, height, width)

    def smallest_latents(self) -> LatentShape:
        return self.expert.smallest_latents()

    def text_dim(self) -> int:
        return self.expert.text_dim()

    def export(self, state_dict: dict[str, Tensor], folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        """Write both transformers' folders, and beside them as much of a pipeline's index as tells what they are."""
        index = self.export_parts(state_dict, folder, max_shard_size)
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def export_parts(
        self, state_dict: dict[str, Tensor], folder: Path, max_shard_size: str = MAX_SHARD_SIZE
    ) -> dict[str, Any]:
        for which, name in FOLDERS.items():
            self.expert.export(_part_of(state_dict, which), folder / name, max_shard_size)
        pipeline = "WanPipeline" if self.image_input is None else "WanImageToVideoPipeline"
        index: dict[str, Any] = {"_class_name": pipeline, **dict.fromkeys(FOLDERS.values(), _CLASS)}
        return index | {"boundary_ratio": self.boundary_ratio, "expand_timesteps": self.expand_timesteps}

    def read_parts(self, folder: Path) -> dict[str, Tensor]:
        return self.read_export(folder)

    def export_adapter(self, weights: dict[str, Tensor], facts: dict[str, Any], folder: Path) -> None:
        """One LoRA for each expert: diffusers loads them one by one, `load_into_transformer_2` says which."""
        for which, name in FOLDERS.items():
            self.expert.export_adapter(_part_of(weights, which), facts, folder / name)

    def read_adapter(self, folder: Path) -> dict[str, Tensor]:
        return _of_both(lambda which: self.expert.read_adapter(folder / FOLDERS[which]))

    def read_export(self, folder: Path) -> dict[str, Tensor]:
        return _of_both(lambda which: self.expert.read_export(folder / FOLDERS[which]))

    def export_original(self, state_dict: dict[str, Tensor], folder: Path) -> None:
        for which in FOLDERS:
            write_original(_part_of(state_dict, which), folder / f"{which}_noise_model.safetensors")

    def read_original(self, folder: Path) -> dict[str, Tensor]:
        return _of_both(lambda which: read_original(folder / f"{which}_noise_model.safetensors"))

    def export_original_adapter(self, weights: dict[str, Tensor], folder: Path) -> None:
        for which in FOLDERS:
            write_original_adapter(_part_of(weights, which), folder / f"{which}_noise_lora.safetensors")

    def read_original_adapter(self, folder: Path) -> dict[str, Tensor]:
        return _of_both(lambda which: read_original_adapter(folder / f"{which}_noise_lora.safetensors"))


def _part_of(tensors: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    """The tensors of one expert, by its own names."""
    return {key.removeprefix(f"{which}."): t for key, t in tensors.items() if key.startswith(f"{which}.")}


def _of_both(read: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of both experts, by the pair's names."""
    return {f"{which}.{key}": tensor for which in FOLDERS for key, tensor in read(which).items()}
