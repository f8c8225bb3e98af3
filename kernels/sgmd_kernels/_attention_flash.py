"""The flash-attn packages: FlashAttention 2, 3 (Hopper) and 4 (CuTe). Imported at the first call that uses them.

Each package's lowest Python layer is called, whose forward hands out the LSE and whose backward takes any. Arguments
go by position as far as their names differ between releases.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

FA2_MODULE = "flash_attn.flash_attn_interface"
FA3_MODULE = "flash_attn_interface"
FA4_MODULE = "flash_attn.cute.interface"
_WHOLE = (-1, -1)  # window sizes: no window


def fa2_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """flash-attn 2.7 or newer."""
    module = _module(FA2_MODULE)
    out, lse = module._flash_attn_forward(q, k, v, 0.0, _scale(q), False, *_WHOLE, 0.0, None, False)[:2]
    return out, lse


def fa2_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Backward of `fa2_forward`."""
    grads = _empty(q, k, v)
    module = _module(FA2_MODULE)
    module._flash_attn_backward(
        grad, q, k, v, out, lse, *grads, 0.0, _scale(q), False, *_WHOLE, 0.0, None, _deterministic(), None
    )
    return grads


def fa3_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention 3, built from flash-attention's folder `hopper`."""
    unused = (None,) * 20  # new keys, output, lengths, pages, rotary tables, scales of float8
    out, lse = _module(FA3_MODULE)._flash_attn_forward(q, k, v, *unused, _scale(q), False)[:2]
    return out, lse


def fa3_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Backward of `fa3_forward`."""
    grads = _empty(q, k, v)
    unused = (None,) * 6  # lengths
    _module(FA3_MODULE)._flash_attn_backward(
        grad, q, k, v, out, lse, *unused, *grads, _scale(q), False, deterministic=_deterministic()
    )
    return grads


def fa4_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """flash-attn-4 (`flash_attn.cute`)."""
    out, lse = _module(FA4_MODULE)._flash_attn_fwd(q, k, v, softmax_scale=_scale(q), return_lse=True)[:2]
    return out, lse


def fa4_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Backward of `fa4_forward`."""
    return _module(FA4_MODULE)._flash_attn_bwd(
        q, k, v, out, grad, lse, softmax_scale=_scale(q), deterministic=_deterministic()
    )[:3]


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _empty(*like: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()
