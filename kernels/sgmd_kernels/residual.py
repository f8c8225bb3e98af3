"""Gated residual addition, in one pass over the activations.

    out = x + gate y                                 (DiT, arXiv 2212.09748, section 3.2)
    dx = dout,   dy = dout gate,   dgate = dout y    the last summed over the tokens that share a gate

Shapes: x and y `[B, L, D]`; gate `[B, 1, D]` (one timestep per sample) or `[B, L, D]` (one per token).
dtypes: each in bfloat16, float16 or float32, out in that of x, gradients in that of their tensor; products and sums in
float32. float64 goes through the reference, in float64.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sgmd_kernels import dispatch, modulation


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, differentiable once with respect to all three; see the file's head.

    Raises:
        ValueError: the shapes do not fit.
    """
    modulation.check(x, gate=gate)
    if y.shape != x.shape:
        raise ValueError(f"y has shape {list(y.shape)} beside x of {list(x.shape)}: expected equal shapes")
    return _gated_residual(x, y, gate)


def reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The forward formula in plain torch."""
    dtype = dispatch.accumulation_dtype(x, y, gate)
    return (x.to(dtype) + y.to(dtype) * gate.to(dtype)).to(x.dtype)


def reference_backward(grad: Tensor, y: Tensor, gate: Tensor, gate_grad: bool) -> tuple[Tensor, Tensor]:
    """The backward formula in plain torch: (dy, dgate); the latter is empty without `gate_grad`."""
    dtype = dispatch.accumulation_dtype(grad, y, gate)
    dout = grad.to(dtype)
    dy = (dout * gate.to(dtype)).to(y.dtype)
    if not gate_grad:
        return dy, gate.new_empty(0)
    return dy, (dout * y.to(dtype)).sum_to_size(gate.shape).to(gate.dtype)


@torch.library.custom_op("sgmd_kernels::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    if not dispatch.runs_triton(x, y, gate):
        return reference(x, y, gate).contiguous()
    x, y, gate = map(dispatch.with_unit_stride, (x, y, gate))
    batch, length, width = x.shape
    out = dispatch.contiguous_like(x)
    block = dispatch.block_size(width)
    with dispatch.on_device_of(x):
        _kernels().forward[(length, batch)](
            x, y, gate, out, length, width,
            *x.stride()[:2], *y.stride()[:2], *modulation.token_strides(gate),
            BLOCK=block, num_warps=dispatch.num_warps(block),
        )  # fmt: skip
    return out


@torch.library.custom_op("sgmd_kernels::gated_residual_backward", mutates_args=())
def _gated_residual_backward(grad: Tensor, y: Tensor, gate: Tensor, gate_grad: bool) -> tuple[Tensor, Tensor]:
    if not dispatch.runs_triton(grad, y, gate):
        dy, dgate = reference_backward(grad, y, gate, gate_grad)
        return dy.contiguous(), dgate.contiguous()
    grad, y, gate = map(dispatch.with_unit_stride, (grad, y, gate))
    batch, length, width = y.shape
    shared = gate_grad and gate.shape[1] == 1
    programs = dispatch.num_reducing_programs(y, length, batch) if shared else length
    dy = dispatch.contiguous_like(y)
    dgate = modulation.gradient_rows(gate, programs if gate_grad else 0)
    block = dispatch.block_size(width)
    with dispatch.on_device_of(y):
        _kernels().backward[(programs, batch)](
            grad, y, gate, dy, dgate, length, width,
            *grad.stride()[:2], *y.stride()[:2], *modulation.token_strides(gate),
            GATE_GRAD=gate_grad, BLOCK=block, num_warps=dispatch.num_warps(block),
        )  # fmt: skip
    return dy, modulation.summed_rows(dgate, gate) if gate_grad else gate.new_empty(0)


@_gated_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return dispatch.contiguous_like(x)


@_gated_residual_backward.register_fake
def _(grad: Tensor, y: Tensor, gate: Tensor, gate_grad: bool) -> tuple[Tensor, Tensor]:
    return dispatch.contiguous_like(y), dispatch.contiguous_like(gate) if gate_grad else gate.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, gate = inputs
    ctx.x_dtype = x.dtype
    # y is read only for the gate's gradient: a gate that needs none lets go of it.
    ctx.save_for_backward(y, gate)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_y, needs_gate = ctx.needs_input_grad
    dx = grad.to(ctx.x_dtype) if needs_x else None
    if not (needs_y or needs_gate):
        return dx, None, None
    dy, dgate = _gated_residual_backward(grad, *ctx.saved_tensors, needs_gate)
    return dx, dy if needs_y else None, dgate if needs_gate else None


_gated_residual.register_autograd(_backward, setup_context=_setup_context)


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernels, one row `[D]` at a time; on how they are written see `adaln._kernels`."""
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def forward(
        x, y, gate, out, length, width, x_batch, x_token, y_batch, y_token, gate_batch, gate_token, BLOCK: tl.constexpr
    ):
        token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        x_row = tl.load(x + sample * x_batch + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
        y_row = tl.load(y + sample * y_batch + token * y_token + column, mask=inside, other=0.0).to(tl.float32)
        gate_row = tl.load(gate + sample * gate_batch + token * gate_token + column, mask=inside, other=0.0)
        total = x_row + y_row * gate_row.to(tl.float32)
        tl.store(out + (sample * length + token) * width + column, total.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def backward(
        grad, y, gate, dy, dgate, length, width, grad_batch, grad_token, y_batch, y_token, gate_batch, gate_token,
        GATE_GRAD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample, programs = tl.program_id(1).to(tl.int64), tl.num_programs(0)
        column = tl.arange(0, BLOCK)
        inside = column < width
        dgate_sum = tl.zeros([BLOCK], dtype=tl.float32)
        token = tl.program_id(0).to(tl.int64)
        while token < length:
            dout = tl.load(grad + sample * grad_batch + token * grad_token + column, mask=inside, other=0.0)
            dout = dout.to(tl.float32)
            gate_row = tl.load(gate + sample * gate_batch + token * gate_token + column, mask=inside, other=0.0)
            scaled = dout * gate_row.to(tl.float32)
            tl.store(dy + (sample * length + token) * width + column, scaled.to(dy.dtype.element_ty), mask=inside)
            if GATE_GRAD:
                y_row = tl.load(y + sample * y_batch + token * y_token + column, mask=inside, other=0.0)
                dgate_sum += dout * y_row.to(tl.float32)
            token += programs
        if GATE_GRAD:
            place = (sample * programs + tl.program_id(0)) * width + column
            tl.store(dgate + place, dgate_sum.to(dgate.dtype.element_ty), mask=inside)

    return SimpleNamespace(forward=forward, backward=backward)
