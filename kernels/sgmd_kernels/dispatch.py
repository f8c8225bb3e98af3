"""Which implementation an operation runs: its Triton kernel, or the plain-torch reference beside it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Setting = Literal["auto", "off"]  # the recipe's parallel.kernels

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED_PROGRAMS = 3


def fused(setting: Setting, device_type: str, triton_installed: bool) -> bool:
    """Whether a model runs the fused operations in place of its own.

    Args:
        setting: `parallel.kernels` of the recipe.
        device_type: `torch.device.type` of the model's tensors.
        triton_installed: see `triton_installed`.
    """
    return setting == "auto" and device_type == "cuda" and triton_installed


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors; the variable is read when triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1" and triton_installed()


def runs_triton(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors takes its kernel: all on CUDA, in a dtype that kernels read, none empty."""
    on_device = all(tensor.is_cuda for tensor in tensors) and triton_installed()
    return (on_device or interpreted()) and all(t.dtype in KERNEL_DTYPES and t.numel() > 0 for t in tensors)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where a tensor has it: what references compute in."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one: Triton launches on the current device, not on the arguments'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def block_size(width: int) -> int:
    """The power of two that holds a row of `width` numbers."""
    return 1 << max(width - 1, 1).bit_length()


def num_warps(block: int) -> int:
    """16 numbers per thread, in 4 to 16 warps."""
    return min(max(block // 512, 4), 16)


def num_reducing_programs(tensor: Tensor, length: int, batch: int) -> int:
    """How many programs share one sample's `length` rows when they sum over the rows.

    Each leaves one partial row, so the sum is the same on every run: few enough that the partial rows cost little
    beside the tensor, enough to fill the device.
    """
    if not tensor.is_cuda:
        return min(length, _INTERPRETED_PROGRAMS)
    return max(min(length, 4 * _num_processors(tensor.device.index) // batch), 1)


@functools.cache
def _num_processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it whose last dim is contiguous: kernels read rows through two outer strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous_like(tensor: Tensor) -> Tensor:
    """An uninitialized contiguous tensor of the same shape and dtype: the layout that operations return."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
