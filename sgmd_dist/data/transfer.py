"""Copies of read units to a GPU, beside its computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


class Flight:
    """Tensors on their way to a device."""

    def __init__(self, tensors: list[Tensor], arrived: torch.cuda.Event) -> None:
        self._tensors, self._arrived = tensors, arrived

    def land(self) -> list[Tensor]:
        """The tensors on the device, to be used in its current stream. The host does not wait."""
        stream = torch.cuda.current_stream(self._tensors[0].device)
        stream.wait_event(self._arrived)
        for tensor in self._tensors:
            tensor.record_stream(stream)  # their memory belongs to the stream that copied
        return self._tensors


class Transfer:
    """Copies pinned host tensors to a CUDA device on a stream of its own.

    It holds the host tensors until the copy is done, so that nobody reads into their memory before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._sources: deque[tuple[torch.cuda.Event, Sequence[Tensor]]] = deque()

    def begin(self, tensors: Sequence[Tensor]) -> Flight:
        """Begin to copy one tensor or more, all in pinned memory."""
        self.release()
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
            done = torch.cuda.Event()
            done.record(self._stream)
        self._sources.append((done, tensors))
        return Flight(copies, done)

    def release(self) -> None:
        """Let go the host tensors whose copies are done."""
        while self._sources and self._sources[0][0].query():
            self._sources.popleft()
