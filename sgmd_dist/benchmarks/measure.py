"""Times on a CUDA device, the ceilings that they are held against, and errors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

_WARMUPS = 5
_FLUSHED_BYTES = 512 * 2**20  # beyond the last-level cache of any card
_COPIED_BYTES = 2**30
_MATRIX_SIZE = 8192


@dataclass(frozen=True)
class Ceilings:
    """What the card reaches in this run: bytes read and written by a copy, multiply-adds of a matrix product."""

    copy_gb_per_s: float
    matrix_tflops: float

    @classmethod
    def measured(cls, dtype: torch.dtype, device: torch.device, repeats: int) -> Ceilings:
        """Of a 1 GiB copy and of a product of two 8192 x 8192 matrices of `dtype`."""
        source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy_ms = median_ms(lambda: target.copy_(source), repeats)
        a, b = torch.randn(2, _MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype, device=device)
        product_ms = median_ms(lambda: a @ b, repeats)
        return cls(2 * _COPIED_BYTES / copy_ms / 1e6, 2 * _MATRIX_SIZE**3 / product_ms / 1e9)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median time of `function` on the current CUDA device, its inputs out of the caches, in milliseconds."""
    for _ in range(_WARMUPS):
        function()
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flushed.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def output_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], num_differentiable: int
) -> list[Tensor]:
    """The output, and its gradient with respect to the first inputs under a cotangent that is a function of its shape.

    The cotangent is rounded to bfloat16, so that it is the same number in every dtype.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:num_differentiable]]
    output = function(*leaves, *inputs[num_differentiable:])
    generator = torch.Generator(output.device).manual_seed(0)
    cotangent = torch.randn(output.shape, generator=generator, device=output.device).to(torch.bfloat16)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))]


def largest_error(
    found: Sequence[Tensor], exact: Sequence[Tensor], tolerance: Mapping[torch.dtype, float]
) -> tuple[float, bool]:
    """The largest error over the largest value of its tensor, and whether each is within the tolerance of its dtype."""
    worst, within = 0.0, True
    for one, other in zip(found, exact, strict=True):
        error = ((one.to(other.dtype) - other).abs().max() / other.abs().max()).item()
        worst = max(worst, error)
        within &= error <= tolerance[one.dtype]  # false where the error is no number
    return worst, within
