"""Attention over the ranks of a sequence against one kernel call, in float64: every length, head count and layout."""

from __future__ import annotations

import gc
from itertools import product

import pytest
import torch
from ranks import run_ranks
from sequence_cases import Case

from sgmd_dist.parallel.mesh import build_mesh, process_group
from sgmd_dist.parallel.sequence import SequenceAxis
from sgmd_kernels.attention import attention

BATCH, HEAD_SIZE = 2, 8
LENGTHS, HEADS = (1, 2, 5, 12, 27), (1, 3, 5)
LAYOUTS = [(3, 1), (1, 3), (4, 1), (1, 4), (2, 2)]  # (ulysses, ring)


def errors(ulysses: int, ring: int, dtype: torch.dtype) -> dict[tuple[int, int], float]:
    """Largest error of output and gradients by (length, heads), of what this rank holds and sums up."""
    with process_group() as device:
        mesh = build_mesh(Case(ulysses=ulysses, ring=ring).layout(), device)
        axis = SequenceAxis(mesh.sequence)
        found = {(length, heads): error(axis, length, heads, dtype) for length, heads in product(LENGTHS, HEADS)}
        del mesh
        gc.collect()
        return found


def error(axis: SequenceAxis, length: int, heads: int, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(length)
    shape = (BATCH, length, heads, HEAD_SIZE)
    *inputs, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = axis.gather(axis.self_attention(*(axis.split(x, 1) for x in leaves), length), 1, length)
    out.backward(grad)
    for leaf in leaves:
        torch.distributed.all_reduce(leaf.grad)
    exact = [x.double().requires_grad_() for x in inputs]
    exact_out = attention(*exact)
    exact_out.backward(grad.double())
    gradients = [(a.grad / axis.size, b.grad) for a, b in zip(leaves, exact, strict=True)]
    return max(float((a - b).abs().max()) for a, b in [(out.detach(), exact_out.detach()), *gradients])


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_output_and_gradients_are_those_of_one_call(ulysses: int, ring: int) -> None:
    for found in run_ranks(ulysses * ring, errors, ulysses, ring, torch.float64):
        assert max(found.values()) < 1e-12, found


def test_half_precision_is_merged_in_float32() -> None:
    """Four parts: no more than the roundings of bfloat16 of a part and of the result."""
    for found in run_ranks(4, errors, 1, 4, torch.bfloat16):
        assert max(found.values()) < 2e-2, found


def mean_errors() -> list[float]:
    """Of the mean over lengths that leave ranks padding or no token at all, and of its gradients, on this rank."""
    with process_group() as device:
        mesh = build_mesh(Case(ulysses=3).layout(), device)
        axis, found = SequenceAxis(mesh.sequence), []
        for length in LENGTHS:
            x = torch.randn(2, length, 4, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
            x.requires_grad_()
            y = axis.mean(axis.split(x, 1).cos(), 1, length)
            y.square().sum().backward()
            torch.distributed.all_reduce(x.grad)
            (exact,) = torch.autograd.grad(x.cos().mean(1).square().sum(), x)
            off = [y - x.cos().mean(1), x.grad / axis.size - exact]
            found.append(max(float(error.detach().abs().max()) for error in off))
        del mesh
        gc.collect()
        return found


def test_the_mean_of_all_tokens_leaves_the_padding_out() -> None:
    for found in run_ranks(3, mean_errors):
        assert max(found) < 1e-14, found
