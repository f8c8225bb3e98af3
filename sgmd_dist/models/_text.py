"""Which rows of zero-padded prompt embeddings are text."""

from __future__ import annotations

from torch import Tensor


def text_mask(prompt_embeds: Tensor) -> Tensor:
    """`[B, T]` bool of prompt embeddings `[B, T, D]`: True for text, False for padding.

    A `Batch` fills prompts up with rows of zeros (`sgmd_dist.batch.padded`) and stores no lengths. The last layer of a
    text encoder is a norm with biases or weights of its own, whose output is not zero in all numbers of a row: a row of
    zeros is padding.
    """
    return (prompt_embeds != 0).any(-1)
