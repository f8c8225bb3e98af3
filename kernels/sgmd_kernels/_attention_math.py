"""Attention written out in plain torch: any device, any dtype, any head size. The reference for every other backend.

Shapes: B batch, L query length, K key length, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of `[B, L, H, D]` over `[B, K, H, D]`; returns out in q's dtype and lse `[B, H, L]`.

    Scores are formed in float32, or in float64 for float64 inputs, and take B·H·L·K numbers of memory.
    """
    scores = _scores(q, k)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhlk,bkhd->blhd", (scores - lse[..., None]).exp(), v.to(scores.dtype))
    return out.to(q.dtype), lse


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv). `out` and `lse` may come from more keys than these: see `attention_backward`."""
    scores = _scores(q, k)
    wide = scores.dtype
    probabilities = (scores - lse[..., None]).exp()
    grad = grad.to(wide)
    dv = torch.einsum("bhlk,blhd->bkhd", probabilities, grad)
    delta = (grad * out.to(wide)).sum(-1).transpose(1, 2)[..., None]
    dscores = probabilities * (torch.einsum("blhd,bkhd->bhlk", grad, v.to(wide)) - delta) * q.shape[-1] ** -0.5
    dq = torch.einsum("bhlk,bkhd->blhd", dscores, k.to(wide))
    dk = torch.einsum("bhlk,blhd->bkhd", dscores, q.to(wide))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("blhd,bkhd->bhlk", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
