"""LTX-Video's attention through a `SequenceAxis`: a processor for its attentions, hooks where tokens are split and
joined.

Shapes: B batch, L tokens, c tokens of this rank's run, T text tokens, H heads, D head size, W = H D width.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from torch import Tensor, nn

from sgmd_dist.models._masked_attention import masked_attention
from sgmd_dist.models._sequence_hooks import Rotary, SequenceHooks
from sgmd_dist.models.base import SequenceAxis


def attach(module: Any, axis: SequenceAxis) -> None:
    """Give every attention of an `LTXVideoTransformer3DModel` a processor, and the network its hooks.

    Tokens are split behind the first projection and joined behind the last. The length travels to the attentions with
    the rotary angles: a recomputed block finds it where its first run did.
    """
    processor = _Processor(axis)
    for block in module.transformer_blocks:
        block.attn1.set_processor(processor)
        block.attn2.set_processor(processor)
    tokens = _Tokens(axis)
    module.rope.register_forward_hook(tokens.split_angles)
    if axis.size > 1:
        module.proj_in.register_forward_hook(tokens.split)
        module.proj_out.register_forward_hook(tokens.join)


class _Tokens(SequenceHooks):
    """The hooks of one network."""

    def split(self, module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        """`[B, L, W]` to `[B, c, W]`."""
        return self._axis.split(tokens, 1)


class _Processor:
    """diffusers' attention processor: projections and norms of the module, self-attention of the axis."""

    def __init__(self, axis: SequenceAxis) -> None:
        self._axis = axis

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """attention_mask: `[B, 1, T]`, what is added to the scores of the text."""
        heads = (attn.heads, -1)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context))
        v = attn.to_v(context).unflatten(2, heads)
        if encoder_hidden_states is None:
            assert image_rotary_emb is not None
            cos, sin, length = image_rotary_emb
            q, k = (apply_rotary_emb(x, (cos, sin)).unflatten(2, heads) for x in (q, k))
            out = self._axis.self_attention(q, k, v, length)
        else:
            assert attention_mask is not None
            out = masked_attention(q.unflatten(2, heads), k.unflatten(2, heads), v, attention_mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))
