"""The planner's activation formulas against what autograd keeps and operations hold, on a small Wan."""

from __future__ import annotations

import pytest
import torch
from small_wan import LATENTS, TEXT_TOKENS, LiveBytes, block_of, kept_bytes, network, pass_shape, saved_bytes, small_wan
from torch.utils.checkpoint import checkpoint

from sgmd_dist.models.base import Gradient
from sgmd_dist.planner.memory import graph_bytes

GRADIENTS: tuple[Gradient, ...] = ("input", "weights")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("cross_attn_norm", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_a_block_keeps_for_backward_is_exact(
    dtype: str, per_token: bool, cross_attn_norm: bool, gradient: Gradient
) -> None:
    model = small_wan(dtype, per_token=per_token, cross_attn_norm=cross_attn_norm)
    planned = model.pass_costs(pass_shape()).activations.block_saved
    assert saved_bytes(block_of(model, gradient)) == planned[GRADIENTS.index(gradient)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("ffn_dim", [48, 130, 280])
def test_the_peak_inside_a_block_without_a_graph(dtype: str, per_token: bool, ffn_dim: int) -> None:
    """Within 3%: rows' statistics are left out."""
    model = small_wan(dtype, per_token=per_token, ffn_dim=ffn_dim)
    block = block_of(model, "none")
    with torch.no_grad(), LiveBytes() as live:
        block.run()
    assert live.peak == pytest.approx(model.pass_costs(pass_shape()).activations.block_forward, rel=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("ffn_dim", [48, 130, 280])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_peak_while_a_block_is_recomputed_and_run_backward(
    dtype: str, per_token: bool, ffn_dim: int, gradient: Gradient
) -> None:
    """Within 3%. The gradient of the block's output stands for the output itself, which has the same size."""
    model = small_wan(dtype, per_token=per_token, ffn_dim=ffn_dim)
    block = block_of(model, gradient)
    output_grad = torch.ones_like(block.arguments[0])
    with LiveBytes() as live:
        output = checkpoint(block.module, *block.arguments, use_reentrant=False)
        live.peak = live.now
        output.backward(output_grad)
    planned = model.pass_costs(pass_shape()).activations
    which = GRADIENTS.index(gradient)
    assert live.peak == pytest.approx(planned.block_saved[which] + planned.block_backward[which], rel=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_a_whole_network_keeps_without_checkpointing(dtype: str, per_token: bool, gradient: Gradient) -> None:
    """Within 2%."""
    model = small_wan(dtype, per_token=per_token)
    module = network(model).requires_grad_(gradient == "weights")
    latents = torch.randn(2, *LATENTS, requires_grad=gradient == "input")
    text = torch.randn(2, TEXT_TOKENS, model.text_dim())
    kept = kept_bytes(
        lambda: model.velocity(module, latents, torch.full((2,), 0.5), text), [*module.parameters(), latents, text]
    )
    costs = model.pass_costs(pass_shape())
    assert kept == pytest.approx(graph_bytes(costs.activations, costs.num_blocks, gradient, "none"), rel=0.02)
