"""The attention backends in the order of preference, and what each of them can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sgmd_kernels import _attention_flash, _attention_math, _attention_sdpa

ONE_TOKEN = "takes no sequence of one token"
_NO_CUDNN = "torch has no cuDNN"
_NEWEST = 99
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """What decides which backends fit. `capability`: (major, minor) of a CUDA device, else None."""

    device_type: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_size: int
    needs_backward: bool
    has_one_token: bool = False

    def __str__(self) -> str:
        arch = "" if self.capability is None else f" sm{self.capability[0]}{self.capability[1]}"
        direction = "forward and backward" if self.needs_backward else "forward"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device_type}{arch}, {dtype}, head size {self.head_size}, {direction}"


@dataclass(frozen=True)
class Backend:
    """Kernels without autograd, and why they cannot take a problem (None where they can).

    `module` is the package that must be there, None where torch suffices.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    unfit: Callable[[Problem], str | None]
    module: str | None = None


def _half_on_cuda(problem: Problem, *, lowest: int, highest: int, largest_head: int) -> str | None:
    """The kernels of half precision, on CUDA devices of `lowest` <= major <= `highest`."""
    if problem.capability is None:
        return "needs a CUDA device"
    if not lowest <= problem.capability[0] <= highest:
        upper = {lowest: "", _NEWEST: " or later"}.get(highest, f" to sm{highest}0")
        return f"needs sm{lowest}0{upper}"
    if problem.dtype not in _HALF:
        return "needs float16 or bfloat16"
    if problem.head_size % 8 or problem.head_size > largest_head:
        return f"needs a head size that is a multiple of 8 up to {largest_head}"
    return None


def _unfit_fa4(problem: Problem) -> str | None:
    return _half_on_cuda(problem, lowest=9, highest=11, largest_head=128)


def _unfit_fa3(problem: Problem) -> str | None:
    return _half_on_cuda(problem, lowest=9, highest=9, largest_head=256)


def _unfit_fa2(problem: Problem) -> str | None:
    return _half_on_cuda(problem, lowest=8, highest=_NEWEST, largest_head=256)


def _unfit_cudnn(problem: Problem) -> str | None:
    reason = _half_on_cuda(problem, lowest=8, highest=_NEWEST, largest_head=128)
    if reason is None and not torch.backends.cudnn.is_available():
        return _NO_CUDNN
    return reason or (ONE_TOKEN if problem.has_one_token else None)


def _unfit_flash(problem: Problem) -> str | None:
    if problem.device_type == "cpu":
        floats = (*_HALF, torch.float32, torch.float64)
        return None if problem.dtype in floats else "needs a float dtype"
    reason = _half_on_cuda(problem, lowest=8, highest=_NEWEST, largest_head=256)
    if reason is None and problem.needs_backward and problem.head_size > 192 and _has_little_shared_memory(problem):
        return "its backward needs a head size of at most 192 on this device"
    return reason


def _has_little_shared_memory(problem: Problem) -> bool:
    """sm86, sm89 and sm120, where torch refuses the backward of large heads."""
    return problem.capability is not None and (problem.capability in ((8, 6), (8, 9)) or problem.capability[0] == 12)


def _unfit_efficient(problem: Problem) -> str | None:
    if problem.capability is None:
        return "needs a CUDA device"
    if problem.dtype not in (*_HALF, torch.float32):
        return "needs float16, bfloat16 or float32"
    unit = 4 if problem.dtype == torch.float32 else 8
    return f"needs a head size that is a multiple of {unit}" if problem.head_size % unit else None


def _unfit_math(problem: Problem) -> str | None:
    return None


# From the fastest on; each device takes the first that fits.
BACKENDS: dict[str, Backend] = {
    "flash_attn_3": Backend(
        _attention_flash.fa3_forward, _attention_flash.fa3_backward, _unfit_fa3, _attention_flash.FA3_MODULE
    ),
    "flash_attn_4": Backend(
        _attention_flash.fa4_forward, _attention_flash.fa4_backward, _unfit_fa4, _attention_flash.FA4_MODULE
    ),
    "cudnn": Backend(_attention_sdpa.cudnn_forward, _attention_sdpa.cudnn_backward, _unfit_cudnn),
    "flash_attn_2": Backend(
        _attention_flash.fa2_forward, _attention_flash.fa2_backward, _unfit_fa2, _attention_flash.FA2_MODULE
    ),
    "flash": Backend(_attention_sdpa.flash_forward, _attention_sdpa.flash_backward, _unfit_flash),
    "efficient": Backend(_attention_sdpa.efficient_forward, _attention_sdpa.efficient_backward, _unfit_efficient),
    "math": Backend(_attention_math.forward, _attention_math.backward, _unfit_math),
}
ORDER = tuple(BACKENDS)

_DEVICES = (("cpu", None), *(("cuda", (major, 0)) for major in (8, 9, 10, 12)))


def unfit_everywhere(name: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Why no device at all lets the backend `name` train with this dtype and head size; None where one does."""
    reasons = [BACKENDS[name].unfit(Problem(kind, arch, dtype, head_size, True)) for kind, arch in _DEVICES]
    if any(reason in (None, _NO_CUDNN) for reason in reasons):
        return None
    return reasons[2]  # of sm90, which every backend knows: no device is missing there
