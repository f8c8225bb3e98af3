"""A checksum of tensors that is the same for every sharding: the sum of their elements' bits as integers, mod 2^64."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sum_of_bits(tensor: Tensor) -> int:
    """The sum of a plain tensor's elements read as signed integers of their size; 0 for an empty one."""
    if tensor.numel() == 0:
        return 0
    return int(tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))


def wrap(value: int) -> int:
    """`value` modulo 2^64, as a signed integer of 64 bits."""
    return (value + 2**63) % 2**64 - 2**63
