"""Ulysses: one all-to-all turns runs of tokens with all heads into all tokens with a share of the heads, and back.

Shapes: N tensors stacked (q, k, v), B batch, c tokens per rank, U ranks, H heads, h = ceil(H / U) heads per rank, D
head size. Heads that only fill up are zeros at the end.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from sgmd_dist.parallel.mesh import process_group_of


def to_heads(x: Tensor, size: int, group: str) -> Tensor:
    """`[N, B, c, H, D]`, this rank's tokens, to `[N, B, U c, h, D]`, this rank's heads; differentiable."""
    padding = -x.shape[3] % size
    x_NBcUhD = functional.pad(x, [0, 0, 0, padding]).unflatten(3, (size, -1))
    x_UNBchD = all_to_all(x_NBcUhD.movedim(3, 0).contiguous(), group)
    return x_UNBchD.movedim(0, 2).flatten(2, 3)


def to_tokens(x: Tensor, heads: int, size: int, group: str) -> Tensor:
    """`[B, U c, h, D]`, this rank's heads, to `[B, c, H, D]`, this rank's tokens; differentiable."""
    x_UBchD = all_to_all(x.unflatten(1, (size, -1)).movedim(1, 0).contiguous(), group)
    return x_UBchD.movedim(0, 2).flatten(2, 3)[:, :, :heads]


@torch.library.custom_op("sgmd_dist::all_to_all", mutates_args=())
def all_to_all(x: Tensor, group: str) -> Tensor:
    """Send x[i] to rank i of the group; [i] of the result came from rank i. Its backward is itself."""
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x.contiguous(), group=process_group_of(group))
    return received


@all_to_all.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx, inputs, output) -> None:
    _, ctx.group = inputs


def _send_back(ctx, grad: Tensor):
    return all_to_all(grad.contiguous(), ctx.group), None


all_to_all.register_autograd(_send_back, setup_context=_remember)
