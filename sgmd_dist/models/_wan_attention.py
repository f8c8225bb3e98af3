"""Wan's attention through a `SequenceAxis`: a processor for its attentions, hooks where tokens are split and joined.

Shapes: B batch, L tokens, c tokens of this rank's run, H heads, D head size, W = H D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sgmd_dist.models._sequence_hooks import Rotary, SequenceHooks
from sgmd_dist.models._wan_image import TEXT_TOKENS
from sgmd_dist.models.base import SequenceAxis


def attach(module: Any, axis: SequenceAxis) -> None:
    """Give every attention of a `WanTransformer3DModel` a processor, and the network its hooks.

    Tokens are split behind the patch embedding and joined behind the last projection, where they are narrowest. The
    length travels to the attentions with the rotary angles: a recomputed block finds it where its first run did.
    """
    processor = _Processor(axis)
    for block in module.blocks:
        block.attn1.set_processor(processor)
        block.attn2.set_processor(processor)
    tokens = _Tokens(axis)
    module.rope.register_forward_hook(tokens.split_angles)
    if axis.size > 1:
        module.register_forward_pre_hook(tokens.split_timesteps, with_kwargs=True)
        module.patch_embedding.register_forward_hook(tokens.split_patches)
        module.proj_out.register_forward_hook(tokens.join)


class _Tokens(SequenceHooks):
    """The hooks of one network."""

    def split_timesteps(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Timesteps per token `[B, L]` go with their tokens; `[B]` stay."""
        timestep = kwargs["timestep"]
        return args, {**kwargs, "timestep": self._axis.split(timestep, 1) if timestep.ndim == 2 else timestep}

    def split_patches(self, module: nn.Module, args: Any, patches: Tensor) -> Tensor:
        """`[B, W, F, Y, X]` to `[B, W, c, 1, 1]`: the network goes on to flatten the last three."""
        return self._axis.split(patches.flatten(2), 2)[..., None, None]


class _Processor:
    """diffusers' attention processor: projections and norms of the module, attention of the axis.

    normed_and_turned: what becomes of projected queries and keys; `_wan_fused` has another one of the same meaning.
    """

    def __init__(self, axis: SequenceAxis) -> None:
        self._axis = axis
        self.normed_and_turned = _normed_and_turned

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        assert attention_mask is None, "Wan's attentions have no mask"
        if encoder_hidden_states is None:
            assert rotary_emb is not None
            cos, sin, length = rotary_emb
            q = self.normed_and_turned(attn.to_q(hidden_states), attn.norm_q, cos, sin, attn.heads)
            k = self.normed_and_turned(attn.to_k(hidden_states), attn.norm_k, cos, sin, attn.heads)
            out = self._axis.self_attention(q, k, attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)), length)
        else:
            q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
            out = self._over_context(attn, q, encoder_hidden_states)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    def _over_context(self, attn: Any, q: Tensor, context: Tensor) -> Tensor:
        """Attention over the text, and over the image tokens before it where the model has projections for them."""
        text = context if attn.add_k_proj is None else context[:, -TEXT_TOKENS:]
        out = self._axis.cross_attention(q, *_keys_values(text, attn.to_k, attn.norm_k, attn.to_v, attn.heads))
        if attn.add_k_proj is None:
            return out
        image = _keys_values(context[:, :-TEXT_TOKENS], attn.add_k_proj, attn.norm_added_k, attn.add_v_proj, attn.heads)
        return out + self._axis.cross_attention(q, *image)


def _keys_values(x: Tensor, to_k: Any, norm_k: Any, to_v: Any, heads: int) -> tuple[Tensor, Tensor]:
    return norm_k(to_k(x)).unflatten(2, (heads, -1)), to_v(x).unflatten(2, (heads, -1))


def _normed_and_turned(x_BLW: Tensor, norm: Any, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """`[B, L, H, D]`: normed over all heads, then each pair of neighbouring numbers turned by its angle, in the angles'
    precision."""
    x_BLHD = norm(x_BLW).unflatten(2, (num_heads, -1))
    even, odd = x_BLHD.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x_BLHD)
