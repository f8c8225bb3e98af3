"""A tensor that may be sharded, as one rank sees it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in its own storage, on which elementwise operations cost a fraction of what they do
    on DTensors.

    Not by `to_local`, which makes a view for autograd: for what is not differentiated.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def counts_here(tensor: Tensor) -> bool:
    """True on one rank of those that hold the same slice: there it enters sums over all ranks."""
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    mesh = tensor.device_mesh
    return all(
        isinstance(placement, Shard) or mesh.get_local_rank(dim) == 0 for dim, placement in enumerate(tensor.placements)
    )
