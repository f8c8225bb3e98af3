"""Attention kernels that run on a CPU, against softmax(q kᵀ / sqrt(D)) v written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgmd_kernels.attention import attention, attention_backward, attention_forward

CPU_BACKENDS = ("flash", "math", "auto")
# (B, L, K, H, D): self and cross lengths, one token, one head, odd sizes
SHAPES = [(2, 27, 27, 3, 10), (1, 5, 33, 1, 12), (2, 1, 1, 2, 8), (1, 45, 7, 5, 16), (1, 70, 64, 2, 64)]
TOLERANCES = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# torch's CPU flash kernel takes a short exponential in half precision
LSE_TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Out `[B, L, H, D]` and lse `[B, H, L]` in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def problem(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    batch, length, keys, heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    lengths = (length, keys, keys, length)
    return [torch.randn(batch, n, heads, size, generator=generator, dtype=torch.float64).to(dtype) for n in lengths]


def largest(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).detach().abs().max())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_forward_backward_and_lse_are_exact(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *inputs, grad = problem(shape, dtype)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = attention(*leaves, backend=backend, return_lse=True)
    out.backward(grad)
    wide = [x.double().requires_grad_() for x in inputs]
    exact_out, exact_lse = exact(*wide)
    exact_out.backward(grad.double())
    assert out.dtype == dtype and out.is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == exact_lse.shape and not lse.requires_grad
    assert largest(lse, exact_lse) < LSE_TOLERANCES[dtype]
    assert largest(out, exact_out) < TOLERANCES[dtype]
    for leaf, expected in zip(leaves, wide, strict=True):
        assert leaf.grad.dtype == dtype
        assert largest(leaf.grad, expected.grad) < 4 * TOLERANCES[dtype] * max(1.0, float(expected.grad.abs().max()))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_through_chunks_of_the_keys_are_the_whole_ones(backend: str) -> None:
    """What ring attention does: chunks of unequal length, merged out and lse, one backward per chunk."""
    q, k, v, grad = problem((2, 11, 29, 3, 12), torch.float64)
    out, lse = exact(q, k, v)
    whole = attention_backward(grad, q, k, v, out, lse, backend=backend)
    chunks = [slice(0, 10), slice(10, 11), slice(11, 29)]
    parts = [attention_backward(grad, q, k[:, c], v[:, c], out, lse, backend=backend) for c in chunks]
    assert largest(sum(part[0] for part in parts), whole[0]) < 1e-13
    assert largest(torch.cat([part[1] for part in parts], 1), whole[1]) < 1e-13
    assert largest(torch.cat([part[2] for part in parts], 1), whole[2]) < 1e-13


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_inputs_may_be_views_and_outputs_are_contiguous(backend: str) -> None:
    *inputs, grad = problem((2, 9, 9, 4, 8), torch.float64)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 1:3] for x in inputs]
    out, lse = attention_forward(*views, backend=backend)
    assert out.is_contiguous() and lse.is_contiguous()
    assert largest(out, exact(*views)[0]) < 1e-13
    gradients = attention_backward(grad[:, :, 1:3], *views, out, lse, backend=backend)
    assert all(g.is_contiguous() for g in gradients)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck(backend: str) -> None:
    inputs = [x.requires_grad_() for x in problem((1, 3, 5, 2, 4), torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, backend=backend), inputs)


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_opcheck(backend: str) -> None:
    q, k, v, grad = problem((2, 5, 7, 2, 8), torch.float32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.sgmd_kernels.attention.default, (*leaves, backend, True))
    out, lse = attention_forward(q, k, v, backend=backend)
    operator = torch.ops.sgmd_kernels.attention_backward.default
    torch.library.opcheck(operator, (grad, q, k, v, out, lse, backend))


def test_it_runs_without_gradients_where_none_are_asked_for() -> None:
    q, k, v, _ = problem((1, 4, 4, 1, 8), torch.float32)
    assert not attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not attention(q.requires_grad_(), k, v).requires_grad


def test_one_operator_stays_in_a_compiled_graph() -> None:
    """No graph break: `fullgraph` raises on one."""
    inputs = [x.requires_grad_() for x in problem((1, 6, 6, 2, 8), torch.float32)[:3]]
    compiled = torch.compile(lambda *x: attention(*x).square().sum(), backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(attention(*inputs).square().sum(), inputs)
    found = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "shapes",
    [((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)), ((1, 4, 2, 8), (1, 4, 3, 8), (1, 4, 3, 8)), ((4, 2, 8),) * 3],
)
def test_shapes_that_do_not_agree_are_refused(shapes) -> None:
    with pytest.raises(ValueError, match=r"attention: q .* expected \[B, L, H, D\]"):
        attention(*(torch.zeros(shape) for shape in shapes))


def test_dtypes_that_do_not_agree_are_refused() -> None:
    x = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match=r"q is torch.float32, k torch.float16"):
        attention(x, x.half(), x.half())
