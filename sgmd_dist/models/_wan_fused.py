"""Wan's transformer block on the fused operations of sgmd_kernels; the mathematics is that of diffusers' block.

Shapes: B batch, L tokens, D width, H heads.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from sgmd_kernels.adaln import adaln
from sgmd_kernels.qk_rope import rms_norm_rope
from sgmd_kernels.residual import gated_residual


def fuse(module: Any) -> None:
    """Make the blocks of a `WanTransformer3DModel` run fused operations; parameters and their names stay.

    Called once, after its attention processors are in place and before blocks are checkpointed and compiled: these
    wrap the forward that they find.
    """
    for block in module.blocks:
        block.forward = functools.partial(_forward, block)
        block.attn1.processor.normed_and_turned = normed_and_turned


def normed_and_turned(x: Tensor, norm: Any, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Queries or keys `[B, L, D]`, normed over all heads and turned by their tokens' angles, `[B, L, H, D/H]`.

    Args:
        norm: torch's `RMSNorm` with weights.
        cos, sin: diffusers' tables `[1, L, 1, D/H]`, which hold each pair's number twice.
    """
    turned = rms_norm_rope(x, norm.weight, cos[0, :, 0, ::2], sin[0, :, 0, ::2], eps=norm.eps)
    return turned.unflatten(2, (num_heads, -1))


def _forward(block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
    """One block: `hidden_states` `[B, L, D]`, `temb` `[B, 6, D]` or, with a timestep per token, `[B, L, 6, D]`."""
    x, norm1, norm3 = hidden_states, block.norm1, block.norm3
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = _modulations(block.scale_shift_table, temb)
    attended = block.attn1(adaln(x, scale, shift, eps=norm1.eps), None, None, rotary_emb)
    x = gated_residual(x, attended, gate)
    x = x + block.attn2(block.norm2(x.float()).type_as(x), encoder_hidden_states, None, None)
    return gated_residual(x, block.ffn(adaln(x, ffn_scale, ffn_shift, eps=norm3.eps)), ffn_gate)


def _modulations(table: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """Six of `[B, 1, D]` or `[B, L, D]`, in float32: views of one sum, which the operations read by its strides."""
    rows = (table + temb.float()).unbind(-2)
    return rows if temb.ndim == 4 else tuple(row[:, None] for row in rows)
