"""What a head keeps for its backward pass, held against autograd."""

from __future__ import annotations

import pytest
import torch
from small_wan import kept_bytes, pass_shape, small_wan

from sgmd_dist import heads
from sgmd_dist.models.base import Gradient
from sgmd_dist.objectives.dmd2 import GanSection


@pytest.mark.parametrize("gradient, which", [("input", 0), ("weights", 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_keeps_what_the_formula_says(dtype: str, gradient: Gradient, which: int) -> None:
    model, section, shape = small_wan(dtype), GanSection(width=32), pass_shape()
    attention = model.attention_shape()
    width, length = attention.num_heads * attention.head_size, model.num_tokens(shape.latent_shape)
    head = heads.Head(2, model, section).to(model.compute_dtype).requires_grad_(gradient == "weights")
    tokens = [torch.randn(2, length, width, dtype=model.compute_dtype, requires_grad=True) for _ in range(2)]
    kept = kept_bytes(lambda: head(tokens, length), list(head.parameters()))
    assert kept == pytest.approx(heads.saved_bytes(section, model, shape)[which], rel=0.02)
