"""The one order in which a network becomes parallel: checkpointing -> compile -> fully_shard -> materialize."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from sgmd_dist.recipe import ParallelSection

# Networks that unpatchify return a view; nothing here writes into a network's output in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def parallelize(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    section: ParallelSection,
    *,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Checkpoint, compile and shard `blocks`, then the root, and give the parameters empty storage on `device`.

    Args:
        module: the network on the meta device, in the dtype of its sharded parameters.
        blocks: its repeated blocks, in forward order.
        mesh: where parameters lie: 1-D (shard) or 2-D (replicate, shard).
        compute_dtype: dtype of the gathered parameters; gradients are reduced in float32.
    """
    for block in blocks:
        if section.activation_checkpointing == "block":
            _checkpoint(block)
        if section.compile:
            block.compile()
    shard = functools.partial(
        fully_shard,
        mesh=mesh,
        # Casting inputs would round timesteps and rotary angles to bfloat16; the model casts what it means to.
        mp_policy=MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False),
        reshard_after_forward=True,  # the root too: gathered parameters would survive a change of requires_grad
    )
    for block in blocks:
        shard(block)
    shard(module)
    return module.to_empty(device=device)


def _checkpoint(block: nn.Module) -> None:
    """Recompute the block in the backward pass. Wrapping `forward`, not the module, keeps parameter names."""
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
