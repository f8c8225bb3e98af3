"""Activation checkpointing of a block: what of its forward pass is kept for the backward, and what runs again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sgmd_dist.parallel.ring  # noqa: F401 (registers the operator)
import sgmd_kernels.attention  # noqa: F401
from sgmd_dist import adapters

_ATTENTION = torch.ops.sgmd_kernels.attention.default
_RING_ATTENTION = torch.ops.sgmd_dist.ring_attention.default
_ATTENTIONS = (
    _ATTENTION,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,  # with a mask torch's own are run
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def recompute_block(block: nn.Module) -> None:
    """Keep the block's inputs and run all of it again."""
    _checkpoint(block)


def recompute_all_but_attention(block: nn.Module) -> None:
    """Keep the block's inputs and the result of its self-attention, and run the rest again.

    Self-attention is the work that grows with the square of the length; its output is one activation wide. Attention
    over the text is run again: over few keys it costs little, and its output is as large.
    """
    _checkpoint(block, context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_self_attention))


def _keep_self_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_self = operator is _RING_ATTENTION or (operator in _ATTENTIONS and args[0].shape == args[1].shape)
    return CheckpointPolicy.MUST_SAVE if is_self else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpoint(block: nn.Module, **options: Any) -> None:
    """Wrap `forward`, not the module: parameters keep their names."""
    forward: Callable[..., Any] = block.forward
    pinned = adapters.pin(block)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(pinned(forward), *args, use_reentrant=False, **options, **kwargs)

    # A function of this file: torch.compile passes over a partial of torch's own `checkpoint` and compiles nothing.
    block.forward = recomputed
