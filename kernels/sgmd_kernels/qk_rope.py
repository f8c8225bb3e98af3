"""RMSNorm across all heads, then rotary embedding, in one pass over a query or key projection.

    z = x rstd w,   rstd = (mean x² + eps)^-½ over all heads' numbers together        (RMSNorm, arXiv 1910.07467)
    y_2i   = z_2i cos_i - z_2i+1 sin_i
    y_2i+1 = z_2i sin_i + z_2i+1 cos_i     i counts the pairs of a head               (RoFormer, arXiv 2104.09864)

    dz = the rotation of dy by the opposite angles
    dx = rstd (w dz - x̂ mean(w dz x̂)),   x̂ = x rstd,   dw = dz x̂ summed over tokens and samples

Wan's convention: the members of a pair are neighbours in memory, and all heads turn by the same angles.
Shapes: x `[B, L, N H]` of N heads, head by head; weight `[N H]`; cos and sin `[L, H/2]`, one number per pair
(diffusers' tables hold each twice). dtypes: x and weight in bfloat16, float16 or float32, y in that of x, gradients in
that of their tensor; the tables in float32; statistics, rotation and sums in float32. float64 goes through the
reference, in float64.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sgmd_kernels import dispatch


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float) -> Tensor:
    """RMSNorm(x) weight, rotated; differentiable once with respect to x and weight. See the file's head.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.dim() != 3 or weight.shape != x.shape[-1:]:
        raise ValueError(f"x has shape {list(x.shape)}, weight {list(weight.shape)}: expected [B, L, D] and [D]")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] != x.shape[1] or x.shape[2] % (2 * cos.shape[1]):
        raise ValueError(
            f"cos has shape {list(cos.shape)}, sin {list(sin.shape)} beside x of {list(x.shape)}: expected"
            f" [{x.shape[1]}, H/2] for heads of H numbers that divide {x.shape[2]}"
        )
    return _rms_norm_rope(x, weight, cos, sin, eps)


def reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The forward formula in plain torch."""
    dtype = dispatch.accumulation_dtype(x, weight)
    wide = x.to(dtype)
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return _rotated(normed * weight.to(dtype), cos.to(dtype), sin.to(dtype)).to(x.dtype)


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """The backward formula in plain torch: (dx, dw); the latter is empty without `weight_grad`."""
    dtype = dispatch.accumulation_dtype(x, weight)
    wide = x.to(dtype)
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = wide * rstd
    dz = _rotated(grad.to(dtype), cos.to(dtype), -sin.to(dtype))
    g = dz * weight.to(dtype)
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz * normed).sum((0, 1)).to(weight.dtype) if weight_grad else weight.new_empty(0)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[B, L, N H]` with each pair turned by the angle of its place in its head."""
    even, odd = x.unflatten(-1, (-1, cos.shape[1], 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(2)


@torch.library.custom_op("sgmd_kernels::rms_norm_rope", mutates_args=())
def _rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    if not dispatch.runs_triton(x, weight, cos, sin):
        return reference(x, weight, cos, sin, eps).contiguous()
    x, weight = dispatch.with_unit_stride(x), weight.contiguous()
    batch, length, width = x.shape
    y = dispatch.contiguous_like(x)
    block = dispatch.block_size(width)
    with dispatch.on_device_of(x):
        _kernels().forward[(length, batch)](
            x, weight, cos, sin, y, length, width, eps,
            *x.stride()[:2], *cos.stride(), *sin.stride(),
            HALF_HEAD=cos.shape[1], BLOCK=block, num_warps=dispatch.num_warps(block),
        )  # fmt: skip
    return y


@torch.library.custom_op("sgmd_kernels::rms_norm_rope_backward", mutates_args=())
def _rms_norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    if not dispatch.runs_triton(grad, x, weight, cos, sin):
        dx, dw = reference_backward(grad, x, weight, cos, sin, eps, weight_grad)
        return dx.contiguous(), dw
    grad, x, weight = dispatch.with_unit_stride(grad), dispatch.with_unit_stride(x), weight.contiguous()
    batch, length, width = x.shape
    programs = dispatch.num_reducing_programs(x, length, batch) if weight_grad else length
    dx = dispatch.contiguous_like(x)
    partial = torch.empty(batch * programs if weight_grad else 0, width, dtype=torch.float32, device=x.device)
    block = dispatch.block_size(width)
    with dispatch.on_device_of(x):
        _kernels().backward[(programs, batch)](
            grad, x, weight, cos, sin, dx, partial, length, width, eps,
            *grad.stride()[:2], *x.stride()[:2], *cos.stride(), *sin.stride(),
            WEIGHT_GRAD=weight_grad, HALF_HEAD=cos.shape[1], BLOCK=block, num_warps=dispatch.num_warps(block),
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if weight_grad else weight.new_empty(0)


@_rms_norm_rope.register_fake
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return dispatch.contiguous_like(x)


@_rms_norm_rope_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return dispatch.contiguous_like(x), dispatch.contiguous_like(weight) if weight_grad else weight.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    dx, dw = _rms_norm_rope_backward(grad, *ctx.saved_tensors, ctx.eps, needs_weight)
    return dx if needs_x else None, dw if needs_weight else None, None, None, None


_rms_norm_rope.register_autograd(_backward, setup_context=_setup_context)


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernels, one row `[N H]` at a time; on how they are written see `adaln._kernels`.

    Rows are read whole and split into pairs in registers: reading even and odd places apart would halve the bytes of
    each memory transaction that are used.
    """
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def forward(
        x, weight, cos, sin, y, length, width, eps,
        x_batch, x_token, cos_token, cos_pair, sin_token, sin_pair,
        HALF_HEAD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        pair = tl.arange(0, BLOCK // 2)
        angle = pair % HALF_HEAD
        row = tl.load(x + sample * x_batch + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
        weight_row = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + token * cos_token + angle * cos_pair, mask=2 * pair < width, other=0.0).to(tl.float32)
        s = tl.load(sin + token * sin_token + angle * sin_pair, mask=2 * pair < width, other=0.0).to(tl.float32)
        z = row * tl.rsqrt(tl.sum(row * row, axis=0) / width + eps) * weight_row
        even, odd = tl.split(tl.reshape(z, (BLOCK // 2, 2)))
        turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK,))
        tl.store(y + (sample * length + token) * width + column, turned.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def backward(
        grad, x, weight, cos, sin, dx, partial, length, width, eps,
        grad_batch, grad_token, x_batch, x_token, cos_token, cos_pair, sin_token, sin_pair,
        WEIGHT_GRAD: tl.constexpr, HALF_HEAD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample, programs = tl.program_id(1).to(tl.int64), tl.num_programs(0)
        column = tl.arange(0, BLOCK)
        inside = column < width
        pair = tl.arange(0, BLOCK // 2)
        angle = pair % HALF_HEAD
        weight_row = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        weight_sum = tl.zeros([BLOCK], dtype=tl.float32)
        token = tl.program_id(0).to(tl.int64)
        while token < length:
            row = tl.load(x + sample * x_batch + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(grad + sample * grad_batch + token * grad_token + column, mask=inside, other=0.0)
            c = tl.load(cos + token * cos_token + angle * cos_pair, mask=2 * pair < width, other=0.0).to(tl.float32)
            s = tl.load(sin + token * sin_token + angle * sin_pair, mask=2 * pair < width, other=0.0).to(tl.float32)
            even, odd = tl.split(tl.reshape(dy.to(tl.float32), (BLOCK // 2, 2)))
            dz = tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), (BLOCK,))
            rstd = tl.rsqrt(tl.sum(row * row, axis=0) / width + eps)
            normed = row * rstd
            g = dz * weight_row
            out = rstd * (g - normed * (tl.sum(g * normed, axis=0) / width))
            tl.store(dx + (sample * length + token) * width + column, out.to(dx.dtype.element_ty), mask=inside)
            weight_sum += dz * normed
            token += programs
        if WEIGHT_GRAD:
            place = (sample * programs + tl.program_id(0)) * width + column
            tl.store(partial + place, weight_sum, mask=inside)

    return SimpleNamespace(forward=forward, backward=backward)
