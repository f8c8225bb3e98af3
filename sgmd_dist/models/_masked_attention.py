"""Attention that leaves keys out, by torch's own kernels: those of sgmd_kernels take no mask.

Shapes: B batch, L queries, K keys, H heads, D head size.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(D) + mask) v for each head.

    Args:
        q: `[B, L, H, D]`.
        k, v: `[B, K, H, D]`.
        mask: `[B, 1, K]`, the same for all queries: bool, False for keys that are left out, or numbers to be added. It
            is read as a view: no scores of L x K are held where a kernel of torch takes a mask, as on CUDA.

    Returns:
        `[B, L, H, D]`.
    """
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None])
    return out.transpose(1, 2)
