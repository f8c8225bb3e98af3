"""Wan by its first release's names: diffusers' own conversion reads back the very tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from sgmd_dist.adapters import Lora
from sgmd_dist.assemble import base_weights, build_model
from sgmd_dist.errors import UserError
from sgmd_dist.export import Form, export_adapter, export_original, with_original_names
from sgmd_dist.models._wan_original import original_name
from sgmd_dist.models.base import VideoModel
from sgmd_dist.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
# Of Wan-AI/Wan2.1-T2V-1.3B, block 0, and what lies around the blocks.
_LAYERS = (
    *("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
    *("time_projection.1", "head.head", "blocks.0.norm3", "blocks.0.ffn.0", "blocks.0.ffn.2"),
    *(f"blocks.0.{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
)
RELEASED = [
    *(f"{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias")),
    *(f"blocks.0.{attention}.norm_{x}.weight" for attention in ("self_attn", "cross_attn") for x in "qk"),
    *("head.modulation", "blocks.0.modulation"),
]


def filled(model: VideoModel) -> dict[str, Tensor]:
    """Parameters that are all different."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(weight.shape, generator=generator) for name, weight in base_weights(model, 0).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_network_is_one_file_with_the_released_names(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = build_model(tiny_recipe(), "generator")
    weights = filled(model)
    assert export_original(weights, model, tmp_path / "out") == len(weights)
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "model.safetensors" and sorted(load_file(file)) == sorted(RELEASED)
    assert same(convert_wan_transformer_to_diffusers(load_file(file)), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_loads_the_file_alone(tiny_recipe: MakeRecipe, tmp_path: Path, dtype: torch.dtype) -> None:
    model = build_model(tiny_recipe(), "generator")
    weights = filled(model)
    export_original(weights, model, tmp_path / "out", Form(dtype))
    (tmp_path / "config").mkdir()
    WanTransformer3DModel.from_config(model.config).save_config(tmp_path / "config")
    file = tmp_path / "out/model.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    loaded = WanTransformer3DModel.from_single_file(str(file), config=str(tmp_path / "config"), local_files_only=True)
    assert same(loaded.float().state_dict(), {name: weight.to(dtype).float() for name, weight in weights.items()})


def test_a_pair_of_experts_is_two_files(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = build_model(tiny_recipe("model.boundary_ratio=0.875"), "generator")
    weights = filled(model)
    export_original(weights, model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "high_noise_model.safetensors", "low_noise_model.safetensors"
    }  # fmt: skip
    found = {
        f"{expert}.{name}": tensor
        for expert in ("high", "low")
        for name, tensor in convert_wan_transformer_to_diffusers(
            load_file(tmp_path / f"out/{expert}_noise_model.safetensors")
        ).items()
    }
    assert same(found, weights)


def test_names_of_image_to_video_are_known_too(tiny_recipe: MakeRecipe) -> None:
    config = build_model(tiny_recipe(), "generator").config | {"image_dim": 16, "added_kv_proj_dim": 24}
    with torch.device("meta"):
        ours = WanTransformer3DModel.from_config(config).state_dict()
    theirs = {original_name(name): tensor for name, tensor in ours.items()}
    assert "blocks.0.cross_attn.k_img.weight" in theirs and "img_emb.proj.4.bias" in theirs
    assert convert_wan_transformer_to_diffusers(theirs).keys() == ours.keys()


# Adapters


def adapter_of(model: VideoModel, layers: list[str], rank: int) -> dict[str, Tensor]:
    generator, base = torch.Generator().manual_seed(0), base_weights(model, 0)
    found = {}
    for layer in layers:
        height, width = base[f"{layer}.weight"].shape
        found[f"{layer}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        found[f"{layer}.lora_B.weight"] = torch.randn(height, rank, generator=generator)
    return found


def test_an_adapter_reads_back_in_diffusers_with_its_scale(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = build_model(tiny_recipe(), "generator")
    with torch.device("meta"):
        layers = [name for name, layer in model.build().named_modules() if isinstance(layer, torch.nn.Linear)]
    weights, lora = adapter_of(model, layers, 4), Lora(4, 8.0, tuple(layers))
    assert export_adapter(weights, lora, model, tmp_path / "lora", original=True) == len(weights)
    found = load_file(tmp_path / "lora/lora.safetensors")
    assert torch.equal(
        found["diffusion_model.blocks.0.cross_attn.o.lora_B.weight"],
        2 * weights["blocks.0.attn2.to_out.0.lora_B.weight"],
    )
    assert found["diffusion_model.blocks.0.self_attn.q.alpha"].item() == 4
    read = with_original_names(model).read_original_adapter(tmp_path / "lora")
    assert same(read, {name: weight * 2 if "lora_B" in name else weight for name, weight in weights.items()})


def test_a_pair_of_experts_has_two_adapters(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = build_model(tiny_recipe("model.boundary_ratio=0.875"), "generator")
    layers = [f"{expert}.blocks.0.attn1.to_{x}" for expert in ("high", "low") for x in "qkv"]
    weights = adapter_of(model, layers, 2)
    export_adapter(weights, Lora(2, 2.0, ("to_q", "to_k", "to_v")), model, tmp_path / "lora", original=True)
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "high_noise_lora.safetensors", "low_noise_lora.safetensors"
    }  # fmt: skip
    assert same(with_original_names(model).read_original_adapter(tmp_path / "lora"), weights)


def test_a_family_without_such_names_says_so() -> None:
    class Other:
        """A family that has none of the methods."""

    with pytest.raises(UserError, match="--keys original: this model family has diffusers' names only; leave out"):
        with_original_names(Other())  # pyright: ignore[reportArgumentType]
