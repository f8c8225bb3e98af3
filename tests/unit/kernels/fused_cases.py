"""The fused operations as cases: random inputs of odd shapes, and the same mathematics in float64 by autograd.

Shared by the tests on CPU, in Triton's interpreter and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgmd_kernels import adaln, qk_rope, residual, sgmd_loss

# Largest error over largest value. The half-precision rows are one unit in the last place: the interpreter cuts bits
# off where a GPU rounds. An output and a gradient are rounded once; what is float32 stays float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = tuple(TOLERANCE)

EPS = 1e-6
FISHER_WEIGHT, NR_WEIGHT = 0.7, 0.1


@dataclass(frozen=True)
class Case:
    """`operation` and `reference` take `inputs(dtype)`, and the first `num_differentiable` of them gradients."""

    name: str
    operation: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[[torch.dtype], Sequence[Tensor]]
    num_differentiable: int


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return qk_rope.rms_norm_rope(x, weight, cos, sin, eps=EPS)


def outer_loss(*tensors: Tensor) -> Tensor:
    return sgmd_loss.outer_loss(*tensors, fisher_weight=FISHER_WEIGHT, nr_weight=NR_WEIGHT).loss


def outer_loss_by_autograd(x0_fake: Tensor, x0_teacher: Tensor, x_g: Tensor, n: Tensor, sigma: Tensor) -> Tensor:
    fisher = (0.5 * (x0_fake - x0_teacher.detach()) ** 2).flatten(1).mean(1) / (n + 1e-8)
    nr = (0.5 * (x0_fake - x_g.detach()) ** 2).flatten(1).mean(1) / sigma
    return FISHER_WEIGHT * fisher - NR_WEIGHT * nr


def adaln_by_autograd(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (variance + EPS).sqrt() * (1 + scale) + shift


def rms_norm_rope_by_autograd(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation as a product of complex numbers."""
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    pairs = torch.view_as_complex(normed.unflatten(-1, (-1, cos.shape[1], 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(2)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _modulations(num: int, batch: int, length: int, width: int) -> tuple[Tensor, ...]:
    """Views of one tensor, strided as the chunks of a time projection are."""
    return _normal(batch, length, num, width).unbind(2)


def _adaln_inputs(batch: int, length: int, width: int, rows: int) -> Callable[[torch.dtype], Sequence[Tensor]]:
    return lambda dtype: ((3 * _normal(batch, length, width) + 1).to(dtype), *_modulations(2, batch, rows, width))


def _mixed_adaln_inputs(dtype: torch.dtype) -> Sequence[Tensor]:
    return _normal(2, 5, 30).to(dtype), _normal(2, 5, 30), _normal(2, 1, 30)


def _residual_inputs(batch: int, length: int, width: int, rows: int) -> Callable[[torch.dtype], Sequence[Tensor]]:
    x, y = _normal(2, batch, length, width)
    return lambda dtype: (x.to(dtype), y.to(dtype), _modulations(2, batch, rows, width)[1])


def _rope_inputs(batch: int, length: int, heads: int, head: int) -> Callable[[torch.dtype], Sequence[Tensor]]:
    def make(dtype: torch.dtype) -> Sequence[Tensor]:
        x = _normal(batch, length, 3 * heads * head).to(dtype)[..., heads * head : 2 * heads * head]
        angles = _normal(length, head).repeat_interleave(2, dim=1)[:, ::4]
        return x, _normal(heads * head).to(dtype), angles.cos(), angles.sin()

    return make


def _loss_inputs(*shape: int) -> Callable[[torch.dtype], Sequence[Tensor]]:
    tensors, n = _normal(3, *shape), _normal(2, shape[0]).abs()
    return lambda dtype: (*tensors.to(dtype), n[0] + 0.1, n[1].clamp(0.02, 0.98))


ADALN = (adaln.adaln, adaln_by_autograd)
RESIDUAL = (residual.gated_residual, lambda x, y, gate: x + y * gate)
ROPE = (rms_norm_rope, rms_norm_rope_by_autograd)
LOSS = (outer_loss, outer_loss_by_autograd)

CASES = [
    Case("adaln: a row per sample", *ADALN, _adaln_inputs(2, 5, 30, 1), 3),
    Case("adaln: a row per token", *ADALN, _adaln_inputs(2, 5, 30, 5), 3),
    Case("adaln: a scale per token, a shift per sample", *ADALN, _mixed_adaln_inputs, 3),
    Case("adaln: odd width", *ADALN, _adaln_inputs(3, 7, 257, 1), 3),
    Case("adaln: one token", *ADALN, _adaln_inputs(2, 1, 33, 1), 3),
    Case("residual: a row per sample", *RESIDUAL, _residual_inputs(2, 5, 30, 1), 3),
    Case("residual: a row per token", *RESIDUAL, _residual_inputs(2, 5, 30, 5), 3),
    Case("residual: odd width", *RESIDUAL, _residual_inputs(3, 7, 257, 1), 3),
    Case("rope: 3 heads of 10", *ROPE, _rope_inputs(2, 5, 3, 10), 2),
    Case("rope: 5 heads of 12", *ROPE, _rope_inputs(1, 7, 5, 12), 2),
    Case("rope: one token", *ROPE, _rope_inputs(3, 1, 2, 128), 2),
    Case("loss: less than a block", *LOSS, _loss_inputs(2, 3, 5, 7, 9), 1),
    Case("loss: blocks and a rest", *LOSS, _loss_inputs(3, 2, 3, 41, 37), 1),
]


def errors(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Largest error over largest value, of the output and of each gradient, against float64."""
    inputs = [tensor.to(device) for tensor in case.inputs(dtype)]
    exact = [tensor.to("cpu", torch.float64) for tensor in inputs]
    got, want = _differentiated(case.operation, inputs, case), _differentiated(case.reference, exact, case)
    names = ["output", *(f"gradient {index}" for index in range(case.num_differentiable))]
    return {
        name: ((g.to("cpu", torch.float64) - w).abs().max() / w.abs().max()).item()
        for name, g, w in zip(names, got, want, strict=True)
    }


def _differentiated(function: Callable[..., Tensor], inputs: Sequence[Tensor], case: Case) -> list[Tensor]:
    leaves = [tensor.requires_grad_() for tensor in inputs[: case.num_differentiable]]
    output = function(*leaves, *inputs[case.num_differentiable :])
    # The cotangent is rounded to bfloat16, so that it is the same number in every dtype.
    cotangent = _normal(*output.shape).to(torch.bfloat16).to(output.device, output.dtype)
    gradients: tuple[Any, ...] = torch.autograd.grad(output, leaves, cotangent)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    return [output.detach(), *gradients]
