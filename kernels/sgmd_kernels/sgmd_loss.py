"""The outer loss of SGMD (arXiv 2605.30116) and its cotangent on f_F, in one pass over the three tensors.

    fisher  = mean ½ (f_F - f_T)² / (n + 1e-8)
    nr      = mean ½ (f_F - x_g)² / max(sigma, 1e-8)
    loss    = fisher_weight fisher - nr_weight nr                                   per sample
    dloss/df_F = [ fisher_weight (f_F - f_T) / (n + 1e-8) - nr_weight (f_F - x_g) / max(sigma, 1e-8) ] / numel

Means run over all but the batch axis, numel counts one sample. Only f_F takes a gradient: the teacher, the sample, the
normalizer n and sigma are constants of the outer loop.

Shapes: f_F, f_T, x_g `[B, ...]`; n and sigma `[B]`. dtypes: each in bfloat16, float16 or float32; losses and cotangent
in float32 (a half-precision cotangent would lose the 1/numel), the gradient in the dtype of f_F. float64 goes through
the reference, in float64.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmd_kernels import dispatch

EPS = 1e-8  # of the normalizer and of sigma
_BLOCK = 4096


class OuterLoss(NamedTuple):
    """Per sample `[B]`: the loss, which carries the gradient, and its two terms without their weights, which do not."""

    loss: Tensor
    fisher: Tensor
    nr: Tensor


def outer_loss(
    x0_fake: Tensor,
    x0_teacher: Tensor,
    x_g: Tensor,
    normalizer: Tensor,
    sigma: Tensor,
    *,
    fisher_weight: float,
    nr_weight: float,
) -> OuterLoss:
    """SGMD's outer loss; differentiable once, with respect to x0_fake alone. See the file's head.

    Raises:
        ValueError: the shapes do not fit.
    """
    if not x0_fake.shape == x0_teacher.shape == x_g.shape:
        shapes = ", ".join(str(list(x.shape)) for x in (x0_fake, x0_teacher, x_g))
        raise ValueError(f"x0_fake, x0_teacher and x_g have shapes {shapes}: expected equal ones")
    if not normalizer.shape == sigma.shape == x0_fake.shape[:1]:
        raise ValueError(
            f"normalizer has shape {list(normalizer.shape)}, sigma {list(sigma.shape)}: expected"
            f" [{x0_fake.shape[0]}], one per sample"
        )
    loss, fisher, nr, _ = _outer_loss(x0_fake, x0_teacher, x_g, normalizer, sigma, fisher_weight, nr_weight)
    return OuterLoss(loss, fisher.detach(), nr.detach())


def reference(
    x0_fake: Tensor,
    x0_teacher: Tensor,
    x_g: Tensor,
    normalizer: Tensor,
    sigma: Tensor,
    fisher_weight: float,
    nr_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formulas in plain torch: (loss, fisher, nr, cotangent)."""
    dtype = dispatch.accumulation_dtype(x0_fake, x0_teacher, x_g, normalizer, sigma)
    f_fake, f_teacher, sample = (x.detach().to(dtype).flatten(1) for x in (x0_fake, x0_teacher, x_g))
    per_fisher, per_nr = normalizer.to(dtype) + EPS, sigma.to(dtype).clamp_min(EPS)
    gap, residual = f_fake - f_teacher, f_fake - sample
    fisher, nr = gap.square().mean(1) / (2 * per_fisher), residual.square().mean(1) / (2 * per_nr)
    cotangent = gap * (fisher_weight / per_fisher)[:, None] - residual * (nr_weight / per_nr)[:, None]
    return fisher_weight * fisher - nr_weight * nr, fisher, nr, (cotangent / gap.shape[1]).view(x0_fake.shape)


@torch.library.custom_op("sgmd_kernels::sgmd_outer_loss", mutates_args=())
def _outer_loss(
    x0_fake: Tensor,
    x0_teacher: Tensor,
    x_g: Tensor,
    normalizer: Tensor,
    sigma: Tensor,
    fisher_weight: float,
    nr_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (x0_fake, x0_teacher, x_g, normalizer, sigma)
    if not dispatch.runs_triton(*inputs):
        return reference(*inputs, fisher_weight, nr_weight)
    x0_fake, x0_teacher, x_g, normalizer, sigma = (tensor.contiguous() for tensor in inputs)
    batch, numel = x0_fake.shape[0], x0_fake[0].numel()
    num_blocks = -(-numel // _BLOCK)
    cotangent = torch.empty(x0_fake.shape, dtype=torch.float32, device=x0_fake.device)
    partial = torch.empty(2, batch, num_blocks, dtype=torch.float32, device=x0_fake.device)
    with dispatch.on_device_of(x0_fake):
        _kernels().forward[(num_blocks, batch)](
            x0_fake, x0_teacher, x_g, normalizer, sigma, cotangent, partial[0], partial[1], numel,
            fisher_weight, nr_weight, EPS, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    fisher, nr = partial.sum(2)
    return fisher_weight * fisher - nr_weight * nr, fisher.clone(), nr.clone(), cotangent


@_outer_loss.register_fake
def _(
    x0_fake: Tensor,
    x0_teacher: Tensor,
    x_g: Tensor,
    normalizer: Tensor,
    sigma: Tensor,
    fisher_weight: float,
    nr_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = dispatch.accumulation_dtype(x0_fake, x0_teacher, x_g, normalizer, sigma)
    loss, fisher, nr = (x0_fake.new_empty(x0_fake.shape[:1], dtype=dtype) for _ in range(3))
    return loss, fisher, nr, torch.empty(x0_fake.shape, dtype=dtype, device=x0_fake.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[3])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (cotangent,) = ctx.saved_tensors
    grad_loss = grads[0]
    if grad_loss is None:
        return (None,) * 7
    per_sample = grad_loss.to(cotangent.dtype).view(-1, *(1,) * (cotangent.dim() - 1))
    return (cotangent * per_sample).to(ctx.dtype), *(None,) * 6


_outer_loss.register_autograd(_backward, setup_context=_setup_context)


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernel, one block of a sample at a time; on how it is written see `adaln._kernels`."""
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def forward(
        x0_fake, x0_teacher, x_g, normalizer, sigma, cotangent, fisher, nr, numel, fisher_weight, nr_weight, eps,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample = tl.program_id(1).to(tl.int64)
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = index < numel
        place = sample * numel + index
        f_fake = tl.load(x0_fake + place, mask=inside, other=0.0).to(tl.float32)
        gap = f_fake - tl.load(x0_teacher + place, mask=inside, other=0.0).to(tl.float32)
        residual = f_fake - tl.load(x_g + place, mask=inside, other=0.0).to(tl.float32)
        per_fisher = 1.0 / ((tl.load(normalizer + sample).to(tl.float32) + eps) * numel)
        per_nr = 1.0 / (tl.maximum(tl.load(sigma + sample).to(tl.float32), eps) * numel)
        toward = fisher_weight * per_fisher * gap - nr_weight * per_nr * residual
        tl.store(cotangent + place, toward, mask=inside)
        partial = sample * tl.num_programs(0) + tl.program_id(0)
        tl.store(fisher + partial, tl.sum(gap * gap, axis=0) * (0.5 * per_fisher))
        tl.store(nr + partial, tl.sum(residual * residual, axis=0) * (0.5 * per_nr))

    return SimpleNamespace(forward=forward)
