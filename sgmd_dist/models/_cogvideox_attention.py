"""CogVideoX' joint attention over text and video through a `SequenceAxis` of one rank.

Shapes: B batch, T text tokens, L video tokens, H heads, D head size, W = H D width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from sgmd_dist.models.base import SequenceAxis

Rotary = tuple[Tensor, Tensor]  # cos and sin `[L, D]`


def attach(module: Any, axis: SequenceAxis) -> None:
    """Give every attention of a `CogVideoXTransformer3DModel` a processor."""
    assert axis.size == 1, "splits_sequences is False"
    processor = _Processor(axis)
    for block in module.transformer_blocks:
        block.attn1.set_processor(processor)


class _Processor:
    """diffusers' attention processor: projections and norms of the module, attention of the axis."""

    def __init__(self, axis: SequenceAxis) -> None:
        self._axis = axis

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video `[B, L, W]` and text `[B, T, W]`; angles turn the video alone."""
        assert attention_mask is None, "CogVideoX' attentions have no mask"
        num_text, num_video = encoder_hidden_states.shape[1], hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], 1)
        q, k, v = (to(joint).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (_turned(x, image_rotary_emb, num_text) for x in (q, k))
        out = self._axis.self_attention(q, k, v, num_text + num_video)
        text, video = attn.to_out[1](attn.to_out[0](out.flatten(2))).split([num_text, num_video], 1)
        return video, text


def _turned(x: Tensor, rotary: Any, num_text: int) -> Tensor:
    text, video = x[:, :num_text], x[:, num_text:]
    turned: Any = apply_rotary_emb(video, rotary, sequence_dim=1)
    return torch.cat([text, turned], 1)
