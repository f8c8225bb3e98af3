"""How a network becomes parallel: sequence -> checkpointing -> compile -> fully_shard -> materialize, in this order."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from loguru import logger
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from sgmd_dist.errors import UserError
from sgmd_dist.models.base import VideoModel
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.parallel.sequence import SequenceAxis
from sgmd_dist.recipe import ParallelSection
from sgmd_kernels import dispatch
from sgmd_kernels.attention import choose

# Networks that unpatchify return a view; nothing here writes into a network's output in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def parallelize(
    module: nn.Module, model: VideoModel, section: ParallelSection, *, mesh: Mesh, compute_dtype: torch.dtype
) -> nn.Module:
    """Split the sequence, checkpoint, compile and shard the blocks, then the root, and give the parameters empty
    storage on the mesh's device.

    Args:
        module: the network on the meta device, in the dtype of its sharded parameters.
        model: its family, which knows its blocks and where its tokens are split and joined.
        compute_dtype: dtype of the gathered parameters; gradients are reduced in float32.

    Raises:
        UserError: `parallel.attention` names a backend that cannot run here.
    """
    _check_attention(section.attention, model, mesh.device, compute_dtype)
    model.attach(module, SequenceAxis(mesh.sequence, section.attention))
    if dispatch.fused(section.kernels, mesh.device.type, dispatch.triton_installed()):
        model.fuse(module)
        _log_once("blocks run fused Triton kernels")
    blocks = model.blocks(module)
    for block in blocks:
        if section.activation_checkpointing == "block":
            _checkpoint(block)
        if section.compile:
            block.compile()
    shard = functools.partial(
        fully_shard,
        mesh=mesh.fsdp,
        # Casting inputs would round timesteps and rotary angles to bfloat16; the model casts what it means to.
        mp_policy=MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False),
        reshard_after_forward=True,  # the root too: gathered parameters would survive a change of requires_grad
    )
    for block in blocks:
        shard(block)
    shard(module)
    return module.to_empty(device=mesh.device)


def _checkpoint(block: nn.Module) -> None:
    """Recompute the block in the backward pass. Wrapping `forward`, not the module, keeps parameter names."""
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    # A function of this file: torch.compile passes over a partial of torch's own `checkpoint` and compiles nothing.
    block.forward = recomputed


def _check_attention(backend: str, model: VideoModel, device: torch.device, dtype: torch.dtype) -> None:
    try:
        choice = choose(backend, device, dtype, model.attention_shape().head_size)
    except ValueError as error:
        raise UserError(f"parallel.attention = {backend}: {error}") from None
    _log_once(f"attention: {choice}")


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
