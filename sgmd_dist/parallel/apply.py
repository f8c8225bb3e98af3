"""How a network becomes parallel, on the meta device: sequence -> checkpointing -> compile -> fully_shard."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from loguru import logger
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    share_comm_ctx,
)

from sgmd_dist import heads
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import VideoModel
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.parallel.recompute import recompute_all_but_attention, recompute_block
from sgmd_dist.parallel.sequence import SequenceAxis
from sgmd_dist.recipe import ParallelSection
from sgmd_kernels import dispatch
from sgmd_kernels.attention import choose

# Networks that unpatchify return a view; nothing here writes into a network's output in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

# Graphs of a block: by role and adapter, frozen or not, with gradients or without, by batch size. Adapters take more
# than torch's own limit of 8, past which blocks would run uncompiled.
_MAX_VARIANTS = 32

_RECOMPUTE: Mapping[str, Callable[[nn.Module], None]] = MappingProxyType(
    {"none": lambda block: None, "block": recompute_block, "selective": recompute_all_but_attention}
)


def parallelize(
    module: nn.Module,
    model: VideoModel,
    section: ParallelSection,
    *,
    mesh: Mesh,
    compute_dtype: torch.dtype,
    offload: bool = False,
) -> nn.Module:
    """Split the sequence, checkpoint, compile and shard the blocks, then each network as a root of its own.

    Args:
        module: the network on the meta device, in the dtype of its sharded parameters; it stays there.
        model: its family, which knows its blocks and where its tokens are split and joined.
        compute_dtype: dtype of the gathered parameters; gradients are reduced in float32.
        offload: keep the shards on the host and bring each block's to the device when it is gathered.

    Raises:
        UserError: `parallel.attention` names a backend that cannot run here.
    """
    _check_attention(section.attention, model, mesh.device, compute_dtype)
    axis = SequenceAxis(mesh.sequence, section.attention)
    model.attach(module, axis)
    heads.attach(module, axis)
    if dispatch.fused(section.kernels, mesh.device.type, dispatch.triton_installed()):
        if model.has_fused_blocks:
            model.fuse(module)
        _log_once(f"blocks run {'fused Triton kernels' if model.has_fused_blocks else 'unfused: the family has none'}")
    if section.compile:
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _MAX_VARIANTS)
    networks = model.networks(module)
    for block in (block for network in networks for block in model.blocks(network)):
        _RECOMPUTE[section.activation_checkpointing](block)
        if section.compile:
            block.compile()
    shard = functools.partial(
        fully_shard,
        mesh=mesh.fsdp,
        # Casting inputs would round timesteps and rotary angles to bfloat16; the model casts what it means to.
        mp_policy=MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy(),
    )
    for network in networks:
        blocks = model.blocks(network)
        for block in blocks:
            _shard_block(block, shard, section.reshard_after_forward, first=model.blocks(networks[0])[0])
        shard(network, reshard_after_forward=True)
        _prefetch(network, blocks, section.forward_prefetch, section.backward_prefetch)
    return module


def _shard_block(block: Any, shard: Callable[..., Any], reshard: bool | int, *, first: Any) -> None:
    """Shard a block. Where it is to lie on a few ranks after its forward pass, it shares the process groups of `first`.

    FSDP2 makes groups of its own for each block: on a GPU, hundreds of communicators.
    """
    if isinstance(reshard, bool) or block is first:
        shard(block, reshard_after_forward=reshard)
        return
    shard(block, reshard_after_forward=True)
    group, shared = (each._get_fsdp_state()._fsdp_param_group for each in (block, first))
    for owner in (group, *group.fsdp_params):
        owner.post_forward_mesh_info = shared.post_forward_mesh_info


def share_streams(roots: Iterable[nn.Module]) -> None:
    """Let networks communicate on one set of streams, whose memory is one pool. Before the first forward pass of any:
    each network's first one makes the streams anew."""
    share_comm_ctx([root for root in roots if isinstance(root, FSDPModule)])


def _prefetch(root: Any, blocks: Sequence[Any], forward: int, backward: int) -> None:
    """Gather the parameters of so many blocks ahead of the one that runs.

    FSDP2 by itself takes the order of the last forward passes, in which networks and passes without a graph follow each
    other: it would gather blocks that the backward pass never reaches. The order of a network's blocks never errs.
    """
    root.set_modules_to_forward_prefetch(blocks[:forward])
    root.set_modules_to_backward_prefetch([*reversed(blocks[max(len(blocks) - backward, 0) :])] or [root])
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + forward])
        # The root is gathered throughout the backward pass: naming it asks for nothing, an empty list for FSDP2's own.
        block.set_modules_to_backward_prefetch([*reversed(blocks[max(i - backward, 0) : i])] or [root])


def _check_attention(backend: str, model: VideoModel, device: torch.device, dtype: torch.dtype) -> None:
    try:
        choice = choose(backend, device, dtype, model.attention_shape().head_size)
    except ValueError as error:
        raise UserError(f"parallel.attention = {backend}: {error}") from None
    _log_once(f"attention: {choice}")


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
