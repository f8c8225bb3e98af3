"""A copy of the training state in host memory, in buffers that stay from one save to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from sgmd_dist.checkpoint.state import Tree
from sgmd_dist.shard import local


class Staging:
    """Host buffers for the state's local parts, pinned where the state is on CUDA, where a stream of its own copies.

    `follow` is called where the state is complete, `copy` in any thread; the copy is done when `copy` returns.
    """

    def __init__(self) -> None:
        self._buffers: Tree = {}
        self._stream: torch.cuda.Stream | None = None

    def follow(self, tree: Tree) -> None:
        """Let the copy begin after what the current stream has been given to do."""
        device = next((local(t).device for part in tree.values() for t in part.values() if local(t).is_cuda), None)
        if device is not None:
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @torch.no_grad()
    def copy(self, tree: Tree) -> Tree:
        """The state's tensors as they are, on the CPU and sharded alike; valid until the next call."""
        with torch.cuda.stream(self._stream):
            for name, part in tree.items():
                buffers = self._buffers.setdefault(name, {})
                for key, tensor in part.items():
                    if key not in buffers:
                        buffers[key] = _buffer(tensor)
                    local(buffers[key]).copy_(local(tensor), non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return {name: {key: self._buffers[name][key] for key in part} for name, part in tree.items()}


def _buffer(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=local(tensor).is_cuda)
