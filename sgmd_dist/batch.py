"""What the stream hands to an objective: one unit, that is one micro-batch of one latent shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgmd_dist.conditions import Condition, TextAndImage
from sgmd_dist.rng import SampleId


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        ids: the samples' places in the stream; they key every random draw. B of them.
        keys: the samples' names in the shards, for messages.
        latent_shape: (C, F, H, W) of the video latents.
        prompt_embeds: `[B, T, D]`, zero-padded to the model's T text tokens.
        negative_embeds: `[1, T, D]`, the data set's negative-prompt embedding.
        latents: real latents `[B, C, F, H, W]`, or None where the shards hold captions only.
        noise: `[B, C, F, H, W]`, of which a teacher made `latents`, or None where the shards hold no such pairs.
        valid: `[B]` bool; False marks a position whose sample could not be read: it weighs nothing.
        condition_latents: `[B, C, F, H, W]` of the images that the videos begin with, or None; see `conditions`.
        image_embeds: `[B, N, E]` of an image encoder beside them, or None.
    """

    ids: Sequence[SampleId]
    keys: Sequence[str]
    latent_shape: tuple[int, int, int, int]
    prompt_embeds: Tensor
    negative_embeds: Tensor
    latents: Tensor | None
    valid: Tensor
    noise: Tensor | None = None
    condition_latents: Tensor | None = None
    image_embeds: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def condition(self) -> Condition:
        """What networks are conditioned on: the prompts, and the images where the samples have them."""
        if self.condition_latents is None:
            return self.prompt_embeds
        return TextAndImage(self.prompt_embeds, self.condition_latents, self.image_embeds)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def padded(prompt_embeds: Tensor, tokens: int) -> Tensor:
    """Prompt embeddings `[n_tokens, D]` cut or filled up with zeros to `[tokens, D]`, as a `Batch` holds them."""
    prompt_embeds = prompt_embeds[:tokens]
    return pad(prompt_embeds, (0, 0, 0, tokens - len(prompt_embeds)))
