"""Wan with its attention through a `SequenceAxis` gives what diffusers' own processors give."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from sgmd_dist.models._wan_attention import attach
from sgmd_dist.parallel.sequence import SequenceAxis

IMAGE_TOKENS = 257


def network(**config) -> WanTransformer3DModel:
    torch.manual_seed(0)
    module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16, **config,
    )  # fmt: skip
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def run(module: WanTransformer3DModel, latents: Tensor, **more: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and all gradients."""
    timestep = more.pop("timestep", torch.tensor([900.0, 20.0]))
    text = more.pop("text", torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)))
    output = module(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False, **more)[0]
    output.square().mean().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def check(module: WanTransformer3DModel, dtype: torch.dtype = torch.float64, **inputs: Tensor) -> None:
    module = module.to(dtype)
    ours = copy.deepcopy(module)
    attach(ours, SequenceAxis(None))
    expected, expected_gradients = run(module, **inputs)
    found, gradients = run(ours, **inputs)
    assert gradients.keys() == expected_gradients.keys()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= tolerance * gradient.abs().max() + 1e-15, name


def latents(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(2)).to(dtype)


def test_text_to_video() -> None:
    check(network(), latents=latents(), text=torch.randn(2, 5, 8, dtype=torch.float64))


def test_a_timestep_per_token() -> None:
    timestep = torch.linspace(0, 1000, 2 * 18).view(2, 18)
    check(network(), latents=latents(), text=torch.randn(2, 5, 8, dtype=torch.float64), timestep=timestep)


def test_image_to_video_attends_to_image_and_text_tokens() -> None:
    module = network(image_dim=6, added_kv_proj_dim=36)
    image = torch.randn(2, IMAGE_TOKENS, 6, dtype=torch.float64)
    text = torch.randn(2, 512, 8, dtype=torch.float64)
    check(module, latents=latents(), text=text, encoder_hidden_states_image=image)


def test_rotary_angles_are_applied_in_their_own_precision() -> None:
    """bfloat16 numbers, float32 angles: the same roundings as diffusers'."""
    text = torch.randn(2, 5, 8).bfloat16()
    check(network(), torch.bfloat16, latents=latents(torch.bfloat16), text=text)


def test_masks_are_refused() -> None:
    module = network()
    attach(module, SequenceAxis(None))
    with pytest.raises(AssertionError, match="no mask"):
        module.blocks[0].attn1(torch.zeros(1, 4, 36), None, torch.ones(4), None)
