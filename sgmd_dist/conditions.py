"""What a network is conditioned on: a text, or a text and the image that the video begins with.

A text alone is its embeddings, a tensor. What batches, guidance and heads do with conditions stands here, so that none
of them knows whether there is an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextAndImage:
    """Conditions of B samples of an image-to-video network.

    Attributes:
        text: prompt embeddings `[B, T, D]`.
        latents: what the VAE makes of the image followed by grey frames, `[B, C, F, H, W]`: the latents' shape.
        embeds: an image encoder's embeddings of the image `[B, N, E]`, or None.
    """

    text: Tensor
    latents: Tensor
    embeds: Tensor | None = None


Condition = Tensor | TextAndImage  # a tensor is the text's embeddings [B, T, D]


def text_of(condition: Condition) -> Tensor:
    """The text's embeddings `[B, T, D]`."""
    return condition if isinstance(condition, Tensor) else condition.text


def with_text(condition: Condition, text: Tensor) -> Condition:
    """The same images with other texts `[B, T, D]`."""
    return text if isinstance(condition, Tensor) else TextAndImage(text, condition.latents, condition.embeds)


def joined(conditions: Sequence[Condition]) -> Condition:
    """Conditions of one kind, one behind the other: B samples each become their sum."""
    texts = torch.cat([text_of(condition) for condition in conditions])
    images = [condition for condition in conditions if isinstance(condition, TextAndImage)]
    if not images:
        return texts
    embeds = [image.embeds for image in images if image.embeds is not None]
    return TextAndImage(texts, torch.cat([image.latents for image in images]), torch.cat(embeds) if embeds else None)
