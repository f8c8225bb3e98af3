"""PyTorch's own fused attentions by their ATen operators, which hand out the LSE and take it back.

Inputs are `[B, L, H, D]`; the operators want `[B, H, L, D]`, so they see transposed views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LSE_ALIGNMENT = 32  # the memory-efficient kernel reads whole rows of this many queries
_aten = torch.ops.aten


def flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """SDPA's FlashAttention: on CUDA in half precision, on the CPU in any."""
    q, k, v = _heads_first(q, k, v)
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out.transpose(1, 2), lse


def flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Backward of `flash_forward`."""
    grad, q, k, v, out = _heads_first(grad, q, k, v, out)
    if q.device.type == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    else:
        seed, offset = _no_dropout(q, torch.uint64)
        lengths: Any = (None, None, q.shape[2], k.shape[2])
        grads = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, *lengths, 0.0, False, seed, offset
        )
    return _heads_first(*grads)


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention."""
    q, k, v = _heads_first(q, k, v)
    out, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out.transpose(1, 2), lse.reshape(out.shape[:3])


def cudnn_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Backward of `cudnn_forward`."""
    grad, q, k, v, out = _heads_first(grad, q, k, v, out)
    seed, offset = _no_dropout(q, torch.int64)
    rest: Any = (None, None, None, q.shape[2], k.shape[2], 0.0, False)  # bias, cumulative lengths, lengths, dropout
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1), seed, offset, *rest
    )
    return _heads_first(*grads)


def efficient_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """SDPA's memory-efficient attention."""
    length = q.shape[1]
    q, k, v = _heads_first(q, k, v)
    out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out.transpose(1, 2), lse[..., :length]


def efficient_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Backward of `efficient_forward`. Rows that only fill up the LSE are infinite: their probabilities are 0."""
    grad, q, k, v, out = _heads_first(grad, q, k, v, out)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=float("inf"))
    seed, offset = _no_dropout(q, torch.int64)
    no_bias: Any = None
    grads = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, no_bias, out, padded, seed[0], offset, 0.0, [True, True, True, False]
    )
    return _heads_first(*grads[:3])


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _no_dropout(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The random state that the operators ask for and, without dropout, never read."""
    return torch.zeros(2, dtype=dtype, device=like.device), torch.zeros((), dtype=dtype, device=like.device)
