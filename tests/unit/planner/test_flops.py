"""The planner's FLOPs against torch's counter on a small Wan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_wan import LATENTS, TEXT_TOKENS, network, pass_shape, small_wan
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sgmd_dist.models.base import Gradient
from sgmd_dist.models.wan import Wan

BATCH = 2


def _forward_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(*map(_heads_first, (q, k, v)))


def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(*map(_heads_first, (grad, q, k, v)))


def _heads_first(shape: torch.Size) -> tuple[int, ...]:
    batch, length, heads, size = shape
    return batch, heads, length, size


ATTENTION = {
    torch.ops.sgmd_kernels.attention: _forward_flops,
    torch.ops.sgmd_kernels.attention_backward: _backward_flops,
}


def counted(model: Wan, gradient: Gradient) -> tuple[int, int]:
    """FLOPs of one pass (forward, backward)."""
    module = network(model).requires_grad_(gradient == "weights")
    latents = torch.randn(BATCH, *LATENTS, requires_grad=gradient == "input")
    text = torch.randn(BATCH, TEXT_TOKENS, model.text_dim())
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with counter:
        velocity = model.velocity(module, latents, torch.full((BATCH,), 0.5), text)
    forward = counter.get_total_flops()
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with counter:
        velocity.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("gradient", ["input", "weights"])
def test_forward_and_backward_are_exact(per_token: bool, gradient: Gradient) -> None:
    model = small_wan("float32", per_token=per_token)
    costs = model.pass_costs(pass_shape(BATCH))
    forward, backward = counted(model, gradient)
    assert forward == sum(part.forward for part in costs.parts)
    assert backward == sum(part.backward(gradient) for part in costs.parts)


def test_ranks_of_a_sequence_share_out_all_but_the_text() -> None:
    """720 tokens on 2 x 2 ranks: a quarter of the tokens, of the attention and of the exchange each."""
    model = small_wan("float32")
    whole = model.pass_costs(pass_shape())
    shape = pass_shape()
    shared = model.pass_costs(type(shape)(shape.batch, LATENTS, TEXT_TOKENS, ring=4, ulysses=1))
    text = model.pass_costs(type(shape)(shape.batch, (4, 1, 2, 2), TEXT_TOKENS)).linear.forward
    assert shared.linear.forward == pytest.approx(whole.linear.forward / 4, abs=text)
    assert shared.self_attention.forward == whole.self_attention.forward / 4
    assert shared.cross_attention.forward == whole.cross_attention.forward / 4


def test_heads_that_only_fill_up_are_computed_too() -> None:
    """3 heads on 2 ulysses ranks: 2 heads on each."""
    model = small_wan("float32")
    shape = pass_shape()
    length = model.num_tokens(LATENTS)
    shared = model.pass_costs(type(shape)(shape.batch, LATENTS, TEXT_TOKENS, ulysses=2))
    assert shared.self_attention.forward == 2 * (4 * shape.batch * length * length * 2 * 16), "of 2 blocks"
