"""The hooks of a network whose tokens are split after its first layers and joined behind its last projection.

Shapes: B batch, L tokens, c tokens of this rank's run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sgmd_dist.models.base import SequenceAxis

Rotary = tuple[Tensor, Tensor, int]  # cos and sin of this rank's run, tokens in their second dim, and the length L


class SequenceHooks:
    """The hooks of one network. `_length` lives from the angles to the last projection of one forward pass."""

    def __init__(self, axis: SequenceAxis) -> None:
        self._axis = axis
        self._length = 0

    def split_angles(self, module: nn.Module, args: Any, angles: tuple[Tensor, Tensor]) -> Rotary:
        cos, sin = angles
        self._length = cos.shape[1]
        return self._axis.split(cos, 1), self._axis.split(sin, 1), self._length

    def join(self, module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        """`[B, c, N]` to `[B, L, N]`."""
        return self._axis.gather(tokens, 1, self._length)
