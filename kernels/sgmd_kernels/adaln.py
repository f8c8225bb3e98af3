"""LayerNorm without weights, then AdaLN's scale and shift, in one pass over the activations.

    y = LayerNorm(x) (1 + scale) + shift            (DiT, arXiv 2212.09748, section 3.2)

    g       = dy (1 + scale),   x̂ = (x - mean) rstd
    dx      = rstd (g - mean g - x̂ mean(g x̂))      means over the width
    dscale  = dy x̂,   dshift = dy                   summed over the tokens that share them

Shapes: x `[B, L, D]`; scale and shift `[B, 1, D]` (one timestep per sample) or `[B, L, D]` (one per token).
dtypes: each of x, scale and shift in bfloat16, float16 or float32, y in that of x, gradients in that of their tensor;
statistics and sums in float32. float64 goes through the reference, in float64.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sgmd_kernels import dispatch, modulation


def adaln(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, differentiable once with respect to all three; see the file's head.

    Raises:
        ValueError: the shapes do not fit.
    """
    modulation.check(x, scale=scale, shift=shift)
    return _adaln(x, scale, shift, eps)


def reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The forward formula in plain torch."""
    dtype = dispatch.accumulation_dtype(x, scale, shift)
    normed = torch.nn.functional.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(dtype)) + shift.to(dtype)).to(x.dtype)


def reference_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, eps: float, modulation_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward formula in plain torch: (dx, dscale, dshift); the last two are empty without `modulation_grads`."""
    dtype = dispatch.accumulation_dtype(x, scale, shift)
    dy, wide_x = grad.to(dtype), x.to(dtype)
    centred = wide_x - wide_x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = centred * rstd
    g = dy * (1 + scale.to(dtype))
    dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    if not modulation_grads:
        return dx.to(x.dtype), scale.new_empty(0), shift.new_empty(0)
    dscale = (dy * normed).sum_to_size(scale.shape).to(scale.dtype)
    return dx.to(x.dtype), dscale, dy.sum_to_size(shift.shape).clone().to(shift.dtype)


@torch.library.custom_op("sgmd_kernels::adaln", mutates_args=())
def _adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    if not dispatch.runs_triton(x, scale, shift):
        return reference(x, scale, shift, eps).contiguous()
    x, scale, shift = map(dispatch.with_unit_stride, (x, scale, shift))
    batch, length, width = x.shape
    y = dispatch.contiguous_like(x)
    block = dispatch.block_size(width)
    with dispatch.on_device_of(x):
        _kernels().forward[(length, batch)](
            x, scale, shift, y, length, width, eps,
            *x.stride()[:2], *modulation.token_strides(scale), *modulation.token_strides(shift),
            BLOCK=block, num_warps=dispatch.num_warps(block),
        )  # fmt: skip
    return y


@torch.library.custom_op("sgmd_kernels::adaln_backward", mutates_args=())
def _adaln_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, eps: float, modulation_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not dispatch.runs_triton(grad, x, scale, shift):
        dx, dscale, dshift = reference_backward(grad, x, scale, shift, eps, modulation_grads)
        return dx.contiguous(), dscale.contiguous(), dshift.contiguous()
    grad, x, scale = map(dispatch.with_unit_stride, (grad, x, scale))
    batch, length, width = x.shape
    shared = modulation_grads and scale.shape[1] == shift.shape[1] == 1
    programs = dispatch.num_reducing_programs(x, length, batch) if shared else length
    dx = dispatch.contiguous_like(x)
    dscale, dshift = (modulation.gradient_rows(m, programs if modulation_grads else 0) for m in (scale, shift))
    block = dispatch.block_size(width)
    with dispatch.on_device_of(x):
        _kernels().backward[(programs, batch)](
            grad, x, scale, dx, dscale, dshift, length, width, eps,
            *grad.stride()[:2], *x.stride()[:2], *modulation.token_strides(scale),
            MODULATION_GRADS=modulation_grads, BLOCK=block, num_warps=dispatch.num_warps(block),
        )  # fmt: skip
    if not modulation_grads:
        return dx, scale.new_empty(0), shift.new_empty(0)
    return dx, modulation.summed_rows(dscale, scale), modulation.summed_rows(dshift, shift)


@_adaln.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return dispatch.contiguous_like(x)


@_adaln_backward.register_fake
def _(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, eps: float, modulation_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not modulation_grads:
        return dispatch.contiguous_like(x), scale.new_empty(0), shift.new_empty(0)
    return dispatch.contiguous_like(x), dispatch.contiguous_like(scale), dispatch.contiguous_like(shift)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_scale, needs_shift, _ = ctx.needs_input_grad
    gradients = _adaln_backward(grad, *ctx.saved_tensors, ctx.eps, needs_scale or needs_shift)
    needed = (needs_x, needs_scale, needs_shift)
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None


_adaln.register_autograd(_backward, setup_context=_setup_context)


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernels, one row `[D]` at a time.

    They are compiled within a function because triton may be missing, and call no function of their own because its
    interpreter does not see enclosing scopes. Loops are `while` because triton 3.6's interpreter cannot run `for` over
    numbers that numpy 2.4 holds.
    """
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def forward(
        x, scale, shift, y, length, width, eps,
        x_batch, x_token, scale_batch, scale_token, shift_batch, shift_token,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        row = tl.load(x + sample * x_batch + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
        scale_row = tl.load(scale + sample * scale_batch + token * scale_token + column, mask=inside, other=0.0)
        shift_row = tl.load(shift + sample * shift_batch + token * shift_token + column, mask=inside, other=0.0)
        centred = tl.where(inside, row - tl.sum(row, axis=0) / width, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
        out = centred * rstd * (1.0 + scale_row.to(tl.float32)) + shift_row.to(tl.float32)
        tl.store(y + (sample * length + token) * width + column, out.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def backward(
        grad, x, scale, dx, dscale, dshift, length, width, eps,
        grad_batch, grad_token, x_batch, x_token, scale_batch, scale_token,
        MODULATION_GRADS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample, programs = tl.program_id(1).to(tl.int64), tl.num_programs(0)
        column = tl.arange(0, BLOCK)
        inside = column < width
        dscale_sum = tl.zeros([BLOCK], dtype=tl.float32)
        dshift_sum = tl.zeros([BLOCK], dtype=tl.float32)
        token = tl.program_id(0).to(tl.int64)
        while token < length:
            row = tl.load(x + sample * x_batch + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(grad + sample * grad_batch + token * grad_token + column, mask=inside, other=0.0)
            dy = dy.to(tl.float32)
            scale_row = tl.load(scale + sample * scale_batch + token * scale_token + column, mask=inside, other=0.0)
            centred = tl.where(inside, row - tl.sum(row, axis=0) / width, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
            normed = centred * rstd
            g = dy * (1.0 + scale_row.to(tl.float32))
            out = rstd * (g - tl.sum(g, axis=0) / width - normed * (tl.sum(g * normed, axis=0) / width))
            tl.store(dx + (sample * length + token) * width + column, out.to(dx.dtype.element_ty), mask=inside)
            dscale_sum += dy * normed
            dshift_sum += dy
            token += programs
        if MODULATION_GRADS:
            # Where each token has its own modulation there is one program per token, and the sum is its gradient.
            place = (sample * programs + tl.program_id(0)) * width + column
            tl.store(dscale + place, dscale_sum.to(dscale.dtype.element_ty), mask=inside)
            tl.store(dshift + place, dshift_sum.to(dshift.dtype.element_ty), mask=inside)

    return SimpleNamespace(forward=forward, backward=backward)
