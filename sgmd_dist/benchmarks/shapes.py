"""The three Wan models as kernels see them: one video of the length that the models were trained for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from sgmd_dist.errors import UserError


@dataclass(frozen=True)
class Shapes:
    """Tokens of one video, heads and their size, text tokens, latents `[C, F, H, W]`, and where timesteps live."""

    tokens: int
    heads: int
    head_size: int
    text_tokens: int
    latents: tuple[int, int, int, int]
    timestep_per_token: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_size


WAN: Mapping[str, Shapes] = MappingProxyType(
    {
        # 480 x 832 pixels, 81 frames; patches of 1 x 2 x 2 latents.
        "wan2.1-1.3b": Shapes(32760, 12, 128, 512, (16, 21, 60, 104)),
        "wan2.1-14b": Shapes(32760, 40, 128, 512, (16, 21, 60, 104)),
        # 704 x 1280 pixels, 121 frames.
        "wan2.2-5b": Shapes(27280, 24, 128, 512, (48, 31, 44, 80), timestep_per_token=True),
    }
)

# For checks on a CPU: the same kinds, in odd sizes.
SMALL: Mapping[str, Shapes] = MappingProxyType(
    {
        "small": Shapes(27, 3, 10, 5, (3, 3, 5, 7)),
        "small per token": Shapes(45, 5, 12, 7, (5, 2, 37, 31), timestep_per_token=True),
    }
)


def select(names: Sequence[str] | None, device: torch.device) -> Mapping[str, Shapes]:
    """The models of these names, by default all: those of `WAN` on CUDA, those of `SMALL` elsewhere.

    Raises:
        UserError: there is no model of a name.
    """
    known = WAN if device.type == "cuda" else SMALL
    wrong = [name for name in names or () if name not in known]
    if wrong:
        raise UserError(f"--models {wrong[0]}: on {device.type} expected some of {', '.join(map(repr, known))}")
    return {name: known[name] for name in names or known}
