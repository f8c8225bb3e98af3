"""LTX-Video's attention through a `SequenceAxis`: a processor for its attentions, hooks where tokens are split and
joined.

Shapes: B batch, L tokens, c tokens of this rank's run, T text tokens, H heads, D head size, W = H D width.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from torch import Tensor, nn

from sgmd_dist.models._masked_attention import masked_attention
from sgmd_dist.models.base import SequenceAxis

Rotary = tuple[Tensor, Tensor, int]  # cos and sin `[B, c, W]` of this rank's run, and the sequence's length L


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


class _Tokens:
    """The hooks of one network. `_length` lives from the angles to the last projection of one forward pass."""

    def __init__(self, axis: SequenceAxis) -> None:
        self._axis = axis
        self._length = 0

    def split_angles(self, module: nn.Module, args: Any, angles: tuple[Tensor, Tensor]) -> Rotary:
        cos, sin = angles
        self._length = cos.shape[1]
        return self._axis.split(cos, 1), self._axis.split(sin, 1), self._length

    def split(self, module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        """`[B, L, W]` to `[B, c, W]`."""
        return self._axis.split(tokens, 1)

    def join(self, module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        """`[B, c, C]` to `[B, L, C]`."""
        return self._axis.gather(tokens, 1, self._length)


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
