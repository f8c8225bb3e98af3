"""The attention backends against torch's own choice, eager and compiled: time, matrix rate, error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sgmd_dist.benchmarks.measure import Ceilings, largest_error, median_ms, output_and_gradients
from sgmd_dist.benchmarks.report import Report, Row
from sgmd_dist.benchmarks.shapes import Shapes
from sgmd_kernels.attention import ORDER, attention, unfit_here

_CHECKED_TOKENS = 1024  # float64 holds the whole matrix of scores: its errors are measured on a part of the video
# Kernels round the probabilities to half precision before they multiply values, which a single rounding cannot tell.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = (
    2,
    5,
)  # products of queries' and keys' lengths by the head size; recomputation in


@dataclass(frozen=True)
class Problem:
    """Self- or cross-attention of one model: `length` queries, `num_keys` keys."""

    kind: str
    length: int
    num_keys: int
    heads: int
    head_size: int

    def inputs(self, dtype: torch.dtype, device: torch.device, most: int | None = None) -> tuple[Tensor, ...]:
        """q `[1, L, H, D]`, k and v `[1, K, H, D]`, cut to the first `most` tokens."""
        generator = torch.Generator(device).manual_seed(0)
        lengths = (self.length, self.num_keys, self.num_keys)
        shapes = [(1, length if most is None else min(length, most), self.heads, self.head_size) for length in lengths]
        return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)

    @property
    def flop(self) -> int:
        """Of the forward and the backward."""
        products = _FORWARD_PRODUCTS + _BACKWARD_PRODUCTS
        return 2 * products * self.heads * self.length * self.num_keys * self.head_size


def run(models: Mapping[str, Shapes], dtype: torch.dtype, device: torch.device, repeats: int, *, timed: bool) -> Report:
    """Every backend on self- and cross-attention of each model: compared with float64, and timed on CUDA.

    A backend that cannot run has a row that says why.
    """
    ceilings = Ceilings.measured(dtype, device, repeats) if timed else None
    report = Report("attention", str(dtype).removeprefix("torch."), "TFLOP/s", ceilings)
    for model, shapes in models.items():
        for problem in _problems(shapes):
            exact = _exact(problem, dtype, device)
            for variant, function, reason in _variants(problem, dtype, device, timed):
                row = Row(problem.kind, model, variant, [1, problem.length, problem.heads, problem.head_size])
                report.rows.append(row)
                if function is None:
                    row.note = reason
                    continue
                found = output_and_gradients(function, problem.inputs(dtype, device, _CHECKED_TOKENS), 3)
                row.error, row.correct = largest_error(found, exact, TOLERANCE)
                if ceilings is not None:
                    _time(row, problem, function, problem.inputs(dtype, device), ceilings, repeats)
    report.compare_with_compile()
    return report


def _problems(shapes: Shapes) -> list[Problem]:
    return [
        Problem("self-attention", shapes.tokens, shapes.tokens, shapes.heads, shapes.head_size),
        Problem("cross-attention", shapes.tokens, shapes.text_tokens, shapes.heads, shapes.head_size),
    ]


def _exact(problem: Problem, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    inputs = [tensor.double() for tensor in problem.inputs(dtype, device, _CHECKED_TOKENS)]
    return output_and_gradients(partial(attention, backend="math"), inputs, 3)


def _variants(
    problem: Problem, dtype: torch.dtype, device: torch.device, timed: bool
) -> Iterator[tuple[str, Callable[..., Tensor] | None, str]]:
    """(name, function, ""), or (name, None, reason) for a backend that cannot run."""
    for name in ORDER:
        reason = unfit_here(name, device, dtype, problem.head_size)
        yield name, None if reason else partial(attention, backend=name), reason or ""
    yield "eager", _torch_s_own, ""
    if timed:
        torch.compiler.reset()
        yield "compile", torch.compile(_torch_s_own, dynamic=False), ""


def _torch_s_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _time(
    row: Row,
    problem: Problem,
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    ceilings: Ceilings,
    repeats: int,
) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    cotangent = torch.ones_like(q)
    try:
        with torch.no_grad():
            row.forward_ms = median_ms(lambda: function(q, k, v), repeats)
        row.forward_backward_ms = median_ms(
            lambda: torch.autograd.grad(function(q, k, v), (q, k, v), cotangent), repeats
        )
    except torch.OutOfMemoryError:
        row.note = "out of memory"
        torch.cuda.empty_cache()
        return
    row.rate = problem.flop / row.forward_backward_ms / 1e9
    row.of_ceiling = row.rate / ceilings.matrix_tflops
