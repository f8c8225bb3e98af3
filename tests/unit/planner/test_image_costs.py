"""FLOPs and activations of image-to-video networks, against torch's counter and autograd on a small Wan."""

from __future__ import annotations

import pytest
import torch
from small_wan import LATENTS, TEXT_TOKENS, block_of, kept_bytes, network, pass_shape, saved_bytes, small_wan
from test_flops import ATTENTION
from torch.utils.flop_counter import FlopCounterMode

from sgmd_dist.conditions import TextAndImage
from sgmd_dist.models.base import Gradient
from sgmd_dist.models.wan import Wan
from sgmd_dist.planner.memory import graph_bytes

GRADIENTS: tuple[Gradient, ...] = ("input", "weights")
CHANNELS = {"in_channels": 12}
KINDS = {"with embeddings": {**CHANNELS, "image_dim": 20, "added_kv_proj_dim": 48}, "without": CHANNELS}


def condition(model: Wan, batch: int) -> TextAndImage:
    image = model.image_input
    assert image is not None
    embeds = torch.randn(batch, image.num_embeds, image.embed_dim) if image.embed_dim else None
    return TextAndImage(torch.randn(batch, TEXT_TOKENS, model.text_dim()), torch.randn(batch, *LATENTS), embeds)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_flops_are_exact(kind: str, gradient: Gradient) -> None:
    model = small_wan("float32", **KINDS[kind])
    module = network(model).requires_grad_(gradient == "weights")
    latents, sigma = torch.randn(2, *LATENTS, requires_grad=gradient == "input"), torch.full((2,), 0.5)
    forward, backward = (FlopCounterMode(display=False, custom_mapping=ATTENTION) for _ in range(2))
    with forward:
        velocity = model.velocity(module, latents, sigma, condition(model, 2))
    with backward:
        velocity.sum().backward()
    costs = model.pass_costs(pass_shape(2))
    assert forward.get_total_flops() == sum(part.forward for part in costs.parts)
    assert backward.get_total_flops() == sum(part.backward(gradient) for part in costs.parts)
    assert costs.output_numbers == velocity.numel()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_a_block_keeps_for_backward_is_exact(gradient: Gradient, dtype: str, batch: int) -> None:
    """512 tokens of text behind 257 of the image."""
    model = small_wan(dtype, **KINDS["with embeddings"])
    planned = model.pass_costs(pass_shape(batch)).activations.block_saved
    assert saved_bytes(block_of(model, gradient, batch, 512 + 257)) == planned[GRADIENTS.index(gradient)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_a_whole_network_keeps_without_checkpointing(gradient: Gradient, kind: str) -> None:
    """Within 3%: for the input's gradient autograd does not keep the text, which the formula counts."""
    model = small_wan("bfloat16", **KINDS[kind])
    module, given = network(model).requires_grad_(gradient == "weights"), condition(model, 2)
    latents, sigma = torch.randn(2, *LATENTS, requires_grad=gradient == "input"), torch.full((2,), 0.5)
    apart = [*module.parameters(), latents, *(t for t in vars(given).values() if t is not None)]
    kept = kept_bytes(lambda: model.velocity(module, latents, sigma, given), apart)
    costs = model.pass_costs(pass_shape(2))
    assert kept == pytest.approx(graph_bytes(costs.activations, costs.num_blocks, gradient, "none"), rel=0.03)
