"""HunyuanVideo-1.5's forward pass for text to video, without the tokens that all others leave out.

diffusers' network puts the tokens of an image and of quoted text (ByT5) beside those of the prompt; without image and
quotes they are masked, and so nothing that is read depends on them. It also sorts each sample's tokens by their mask,
which a GPU has to be waited for. Here the prompt's tokens stay in their places and the mask stands for the rest.

Shapes: B batch, T text tokens, L video tokens, H heads, D head size, W = H D width.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from sgmd_dist.models._masked_attention import masked_attention
from sgmd_dist.models.base import SequenceAxis

Rotary = tuple[Tensor, Tensor]  # cos and sin `[L, D]`


def attach(module: Any, axis: SequenceAxis) -> None:
    """Give a `HunyuanVideo15Transformer3DModel` this forward pass, and every attention of its blocks a processor.

    Called before the network is sharded, whose hooks wrap the forward that they find.
    """
    assert axis.size == 1, "splits_sequences is False"
    for block in module.transformer_blocks:
        block.attn.set_processor(_Processor())
    module.forward = functools.partial(_forward, module)


def _forward(network: Any, latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor]:
    """The velocity `[B, C, F, H, W]`, in a tuple.

    Args:
        latents: `[B, 2 C + 1, F, H, W]` with the condition's, zeros, and its mask.
        timestep: `[B]` float32; its sinusoids are cast, not the timestep itself.
        text: `[B, T, W']`.
        mask: `[B, T]` bool, True for text.
    """
    config, embed = network.config, network.time_embed
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    grid = [size // unit for size, unit in zip(latents.shape[2:], patch, strict=True)]
    rotary = network.rope(latents)
    modulation = embed.timestep_embedder(embed.time_proj(timestep).to(latents.dtype))
    text = network.context_embedder(text, timestep, mask) + network.cond_type_embed.weight[0]
    video = network.x_embedder(latents)
    joint_mask = torch.cat([mask.new_ones(1, 1).expand(len(video), video.shape[1]), mask], 1)[:, None]
    for block in network.transformer_blocks:
        video, text = block(video, text, modulation, joint_mask, rotary)
    tokens = network.proj_out(network.norm_out(video, modulation)).unflatten(2, (-1, *patch)).unflatten(1, grid)
    return (tokens.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3),)


class _Processor:
    """diffusers' attention processor: projections and norms of the module, one mask for all queries.

    Padding of the text is no key; what it makes as a query is read by none.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video `[B, L, W]`, text `[B, T, W]`, mask `[B, 1, L + T]`; angles turn the video alone."""
        assert attention_mask is not None and image_rotary_emb is not None
        heads, angles = (attn.heads, -1), cast(Any, image_rotary_emb)
        q, k, v = (to(hidden_states).unflatten(2, heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        turned: list[Any] = [apply_rotary_emb(x, angles, sequence_dim=1) for x in (attn.norm_q(q), attn.norm_k(k))]
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (to(encoder_hidden_states).unflatten(2, heads) for to in added)
        normed = (attn.norm_added_q(text_q), attn.norm_added_k(text_k), text_v)
        q, k, v = (torch.cat(pair, 1) for pair in zip((*turned, v), normed, strict=True))
        out = masked_attention(q, k, v, attention_mask).flatten(2)
        video, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)
