"""How steady videos are over time, from their latents `[N, C, F, H, W]`; pure functions for any model's latents.

Both say "best" of a video that stands still: read them beside its motion.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frame_consistency(latents: Tensor) -> Tensor:
    """Mean cosine similarity of neighbouring frames, `[N]` float64 in [-1, 1]; 1 for an image."""
    if latents.shape[2] < 2:
        return torch.ones(len(latents), dtype=torch.float64, device=latents.device)
    frames = latents.double().transpose(1, 2).flatten(2)  # [N, F, C H W]
    return torch.cosine_similarity(frames[:, 1:], frames[:, :-1], dim=2).mean(dim=1)


def frame_colour_drift(latents: Tensor) -> Tensor:
    """How far a video's mean colour goes from its first to its last frame, `[N]` float64, in units of latents.

    Root mean square over channels of the difference of the frames' means; 0 for an image.
    """
    means = latents.double().mean(dim=(3, 4))  # [N, C, F]
    return (means[:, :, -1] - means[:, :, 0]).square().mean(dim=1).sqrt()
