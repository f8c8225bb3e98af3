"""What the stream hands to an objective: one unit, that is one micro-batch of one latent shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    """

    ids: Sequence[SampleId]
    keys: Sequence[str]
    latent_shape: tuple[int, int, int, int]
    prompt_embeds: Tensor
    negative_embeds: Tensor
    latents: Tensor | None
    valid: Tensor
    noise: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            prompt_embeds=self.prompt_embeds.to(device, non_blocking=True),
            negative_embeds=self.negative_embeds.to(device, non_blocking=True),
            latents=None if self.latents is None else self.latents.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            noise=None if self.noise is None else self.noise.to(device, non_blocking=True),
        )


def padded(prompt_embeds: Tensor, tokens: int) -> Tensor:
    """Prompt embeddings `[n_tokens, D]` cut or filled up with zeros to `[tokens, D]`, as a `Batch` holds them."""
    prompt_embeds = prompt_embeds[:tokens]
    return pad(prompt_embeds, (0, 0, 0, tokens - len(prompt_embeds)))
