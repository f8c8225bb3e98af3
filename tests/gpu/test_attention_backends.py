"""Every attention backend that runs on this card, forward, LSE and backward, against float64."""

from __future__ import annotations

import pytest
import torch

from sgmd_kernels._attention_table import BACKENDS
from sgmd_kernels.attention import _kernel, _problem, _reason_against, attention_backward, attention_forward

pytestmark = pytest.mark.gpu

# (B, L, K, H, D): self and cross lengths that no block size divides
SHAPES = [(1, 1000, 1000, 3, 128), (2, 333, 77, 2, 64), (1, 65, 512, 5, 128), (1, 1, 1, 1, 64)]
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-3, torch.float64: 1e-12}


def skip_where_unfit(backend: str, dtype: torch.dtype, head_size: int) -> None:
    reason = _reason_against(backend, _problem(torch.device("cuda", 0), dtype, head_size, True, False))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_agrees_with_float64(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, keys, heads, size = shape
    skip_where_unfit(backend, dtype, size)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (
        torch.randn(batch, n, heads, size, generator=generator, device="cuda", dtype=torch.float64).to(dtype)
        for n in (length, keys, keys, length)
    )
    out, lse = attention_forward(q, k, v, backend=backend)
    wide = [x.double() for x in (q, k, v)]
    exact_out, exact_lse = attention_forward(*wide, backend="math")
    exact = attention_backward(grad.double(), *wide, exact_out, exact_lse, backend="math")
    assert lse.shape == (batch, heads, length) and (lse - exact_lse).abs().max() < 2e-3
    assert (out - exact_out).abs().max() < TOLERANCES[dtype]
    for found, expected in zip(attention_backward(grad, q, k, v, out, lse, backend=backend), exact, strict=True):
        assert (found - expected).abs().max() < 4 * TOLERANCES[dtype] * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_chunks_of_the_keys_add_up(backend: str) -> None:
    """Ring attention's use: out and lse of all keys, one backward per chunk."""
    skip_where_unfit(backend, torch.bfloat16, 128)
    q, k, v, grad = (torch.randn(1, n, 2, 128, device="cuda", dtype=torch.bfloat16) for n in (200, 301, 301, 200))
    out, lse = attention_forward(q, k, v, backend=backend)
    exact = attention_backward(grad, q, k, v, out, lse, backend="math")
    parts = [
        attention_backward(grad, q, k[:, c], v[:, c], out, lse, backend=backend)
        for c in (slice(0, 130), slice(130, 301))
    ]
    assert (sum(p[0].float() for p in parts) - exact[0]).abs().max() < 2e-2
    assert (torch.cat([p[1] for p in parts], 1) - exact[1]).abs().max() < 2e-2
    assert (torch.cat([p[2] for p in parts], 1) - exact[2]).abs().max() < 2e-2


def test_auto_takes_a_fused_kernel_in_half_precision() -> None:
    q = torch.zeros(1, 64, 2, 128, device="cuda", dtype=torch.bfloat16)
    assert _kernel("auto", q, q, True) is not BACKENDS["math"]
