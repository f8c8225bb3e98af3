"""Softmax attention without mask or dropout on the fastest kernel present: `[B, L, H, D]`, forward and backward.

`attention` is differentiable. `attention_forward` and `attention_backward` are the same kernels without autograd, for
ring attention, which joins several chunks of keys by their log-sum-exp (LSE).

| backend        | what                              | device           | dtypes                | head size            |
|----------------|-----------------------------------|------------------|-----------------------|----------------------|
| `flash_attn_3` | `flash_attn_interface`            | sm90             | fp16, bf16            | 8n to 256            |
| `flash_attn_4` | flash-attn-4 (CuTe)               | sm90 to sm110    | fp16, bf16            | 8n to 128            |
| `cudnn`        | SDPA's cuDNN                      | sm80 and later   | fp16, bf16            | 8n to 128            |
| `flash_attn_2` | flash-attn 2.7 and later          | sm80 and later   | fp16, bf16            | 8n to 256            |
| `flash`        | SDPA's FlashAttention             | sm80+, CPU       | fp16, bf16; CPU: any  | 8n to 256; CPU: any  |
| `efficient`    | SDPA's memory-efficient attention | CUDA             | fp16, bf16, fp32      | 8n (fp32: 4n)        |
| `math`         | plain torch, L x K memory         | any              | any                   | any                  |

`auto` takes the first of `ORDER` that fits. A backend that cannot take sequences of one token (cuDNN) hands those to
`auto`, also when it is forced: a chunk of a split sequence may be that short.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, overload

import torch
from torch import Tensor

from sgmd_kernels._attention_table import BACKENDS, ONE_TOKEN, ORDER, Backend, Problem, unfit_everywhere

__all__ = [
    "AUTO",
    "ORDER",
    "Choice",
    "attention",
    "attention_backward",
    "attention_forward",
    "choose",
    "unfit_everywhere",
    "unfit_here",
]

AUTO = "auto"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A backend's name and, for each of `ORDER` that was not taken before it, the reason."""

    name: str
    passed_over: Mapping[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items())
        return f"{self.name} (passed over: {reasons})" if reasons else self.name


def choose(
    backend: str, device: torch.device, dtype: torch.dtype, head_size: int, *, needs_backward: bool = True
) -> Choice:
    """The backend that `attention` takes for such inputs; logged once for each kind of input.

    Raises:
        ValueError: there is no backend of that name, or the forced one cannot run here; the message lists what is
            installed and why each other one would not do either.
    """
    return _resolve(backend, _problem(device, dtype, head_size, needs_backward, False))


def unfit_here(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why `backend` cannot run such inputs forward and backward on this device; None where it can."""
    return _reason_against(backend, _problem(device, dtype, head_size, True, False))


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = AUTO, return_lse: Literal[False] = False
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = AUTO, return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = AUTO, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt(D)) v for each head, differentiable (once) in q, k and v.

    Args:
        q: `[B, L, H, D]`.
        k, v: `[B, K, H, D]` of q's dtype; K may differ from L, both are at least 1.
        backend: `auto` or a name of `ORDER`.
        return_lse: give the log-sum-exp of the scaled scores too; it carries no gradient.

    Returns:
        `[B, L, H, D]` in q's dtype, contiguous; with `return_lse` also lse `[B, H, L]`, float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes do not agree, or the backend cannot run here.
    """
    _check(q, k, v)
    needs_backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out, lse = _attention_op(q, k, v, backend, needs_backward)
    return (out, lse.detach()) if return_lse else out


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = AUTO, needs_backward: bool = True
) -> tuple[Tensor, Tensor]:
    """`attention` without autograd: (out `[B, L, H, D]`, lse `[B, H, L]`), both contiguous."""
    kernel = _kernel(backend, q, k, needs_backward)
    out, lse = kernel.forward(q, k, v)
    return out.contiguous(), lse.contiguous()


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, backend: str = AUTO
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `attention_forward`, contiguous.

    Exact also where k and v are one chunk of the keys that `out` and `lse` were merged over: the probabilities are
    exp(scores - lse), and the row sums of grad_out · out are those of the whole. dk and dv are then the chunk's
    gradients, and dq adds up over the chunks.
    """
    kernel = _kernel(backend, q, k, True)
    dq, dk, dv = kernel.backward(grad_out.contiguous(), q, k, v, out, lse)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


# The operator: opaque to torch.compile, saved or recomputed as one by activation checkpointing.


@torch.library.custom_op("sgmd_kernels::attention", mutates_args=())
def _attention_op(q: Tensor, k: Tensor, v: Tensor, backend: str, needs_backward: bool) -> tuple[Tensor, Tensor]:
    return attention_forward(q, k, v, backend=backend, needs_backward=needs_backward)


@torch.library.custom_op("sgmd_kernels::attention_backward", mutates_args=())
def _attention_backward_op(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(grad_out, q, k, v, out, lse, backend=backend)


@_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str, needs_backward: bool) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=wide)


@_attention_backward_op.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.backend, _ = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, grad_out: Tensor, _: Tensor):
    return *_attention_backward_op(grad_out, *ctx.saved_tensors, ctx.backend), None, None


_attention_op.register_autograd(_differentiate, setup_context=_save)


# Dispatch


def _kernel(backend: str, q: Tensor, k: Tensor, needs_backward: bool) -> Backend:
    has_one_token = q.shape[1] == 1 or k.shape[1] == 1
    problem = _problem(q.device, q.dtype, q.shape[-1], needs_backward, has_one_token)
    return BACKENDS[_resolve(backend, problem).name]


def _problem(
    device: torch.device, dtype: torch.dtype, head_size: int, needs_backward: bool, has_one_token: bool
) -> Problem:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return Problem(device.type, capability, dtype, head_size, needs_backward, has_one_token)


@cache
def _resolve(backend: str, problem: Problem) -> Choice:
    if backend not in (AUTO, *ORDER):
        raise ValueError(f"attention backend {backend!r}: no such backend; expected {', '.join((AUTO, *ORDER))}")
    if backend != AUTO and (reason := _reason_against(backend, problem)) is not None:
        if reason == ONE_TOKEN:
            return _resolve(AUTO, problem)
        raise ValueError(_cannot(backend, reason, problem))
    passed_over: dict[str, str] = {}
    for name in ORDER if backend == AUTO else (backend,):
        reason = _reason_against(name, problem)
        if reason is None:
            choice = Choice(name, passed_over)
            _log.info("attention on %s: %s", problem, choice)
            return choice
        passed_over[name] = reason
    raise AssertionError("math fits everything")


def _cannot(backend: str, reason: str, problem: Problem) -> str:
    complete = [name for name in ORDER if _reason_missing(name) is None]
    others = [(name, _reason_against(name, problem)) for name in ORDER if name != backend]
    fit = [name for name, why in others if why is None]
    unfit = "; ".join(f"{name}: {why}" for name, why in others if why is not None)
    return (
        f"attention backend {backend!r} cannot run on {problem}: {reason}."
        f" No package is missing for: {', '.join(complete)}."
        f" Would run: {', '.join(fit)}. Would not: {unfit or 'none'}. Choose one that runs, or auto"
    )


def _reason_against(name: str, problem: Problem) -> str | None:
    """Why `name` cannot take `problem`; None where it can. Looks for its package last: that may import much."""
    return BACKENDS[name].unfit(problem) or _reason_missing(name)


@cache
def _reason_missing(name: str) -> str | None:
    module = BACKENDS[name].module
    if module is None:
        return None
    try:
        importlib.import_module(module)
    except Exception as error:  # a package built for another torch or CUDA raises anything
        line = next(iter(str(error).splitlines()), "")
        return f"{module} cannot be imported ({type(error).__name__}: {line})"
    return None


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected [B, L, H, D] and twice"
            " [B, K, H, D]"
        )
    if 0 in (q.shape[1], k.shape[1]):
        raise ValueError(f"attention: {q.shape[1]} queries and {k.shape[1]} keys: expected at least one of each")
    if not q.dtype.is_floating_point:
        raise ValueError(f"attention: q is {q.dtype}: expected a float dtype")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}: expected one dtype")
