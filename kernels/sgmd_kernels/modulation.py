"""Modulations of a transformer's tokens, one row per sample or per token: their shapes, strides and gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def check(x: Tensor, **modulations: Tensor) -> None:
    """Raises ValueError unless x is `[B, L, D]` and each modulation `[B, 1, D]` or `[B, L, D]`."""
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}: expected [B, L, D]")
    batch, length, width = x.shape
    for name, modulation in modulations.items():
        if modulation.shape not in ((batch, 1, width), (batch, length, width)):
            raise ValueError(
                f"{name} has shape {list(modulation.shape)} beside x of {list(x.shape)}: expected"
                f" [{batch}, 1, {width}] or [{batch}, {length}, {width}]"
            )


def token_strides(modulation: Tensor) -> tuple[int, int]:
    """Strides of batch and token; 0 for the latter where all tokens of a sample share one row."""
    return modulation.stride(0), modulation.stride(1) if modulation.shape[1] > 1 else 0


def gradient_rows(modulation: Tensor, programs: int) -> Tensor:
    """`[B, programs, D]` for a kernel to write a modulation's gradient to; float32 for rows that are partial sums."""
    dtype = torch.float32 if modulation.shape[1] == 1 else modulation.dtype
    return torch.empty(modulation.shape[0], programs, modulation.shape[2], dtype=dtype, device=modulation.device)


def summed_rows(rows: Tensor, modulation: Tensor) -> Tensor:
    """Rows of `gradient_rows` in the modulation's shape and dtype."""
    return (rows.sum(1, keepdim=True) if modulation.shape[1] == 1 else rows).to(modulation.dtype)
