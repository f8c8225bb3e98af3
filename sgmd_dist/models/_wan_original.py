"""Wan's tensors by the names of its first release, which ComfyUI and the original code read.

Whole parts of a name between dots are replaced, longer ones first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

_TABLE = "scale_shift_table"  # of the network itself; the blocks have one each
_PARTS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
    "norm2": "norm3",  # the one before cross-attention, which alone has weights
    "proj_out": "head.head",
    _TABLE: "modulation",
}
_LORA_PREFIX = "diffusion_model."


def original_name(name: str) -> str:
    """The first release's name of a parameter, or of an adapter's tensor."""
    if name == _TABLE:
        return "head.modulation"
    dotted = f".{name}."
    for ours, theirs in _PARTS.items():
        dotted = dotted.replace(f".{ours}.", f".{theirs}.")
    return dotted[1:-1]


def write_original(weights: Mapping[str, Tensor], file: Path) -> None:
    """Write a network's parameters as one file."""
    save_file({original_name(name): weight.contiguous() for name, weight in weights.items()}, file, {"format": "pt"})


def read_original(file: Path) -> dict[str, Tensor]:
    """The parameters of such a file by diffusers' names, as diffusers' own conversion names them."""
    return cast(dict[str, Tensor], convert_wan_transformer_to_diffusers(load_file(file)))


def write_original_adapter(weights: Mapping[str, Tensor], file: Path) -> None:
    """Write an adapter as one file. In the blocks alpha is written too, as the rank; diffusers takes none elsewhere."""
    tensors = {f"{_LORA_PREFIX}{original_name(name)}": weight.contiguous() for name, weight in weights.items()}
    for name, weight in weights.items():
        if name.startswith("blocks.") and name.endswith(".lora_A.weight"):
            layer = original_name(name).removesuffix(".lora_A.weight")
            tensors[f"{_LORA_PREFIX}{layer}.alpha"] = torch.tensor(float(weight.shape[0]))
    save_file(tensors, file, {"format": "pt"})


def read_original_adapter(file: Path) -> dict[str, Tensor]:
    """The tensors of such a file by diffusers' names, as its own LoRA loader reads them."""
    found = WanLoraLoaderMixin.lora_state_dict(
        str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True
    )
    return {name.removeprefix("transformer."): tensor for name, tensor in cast(dict[str, Tensor], found).items()}
