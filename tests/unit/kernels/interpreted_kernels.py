"""The Triton kernels on CPU tensors: run by test_fused_triton.py, under TRITON_INTERPRET=1, in a process of its own."""

from __future__ import annotations

import pytest
import torch
from fused_cases import CASES, DTYPES, TOLERANCE, Case, errors

from sgmd_kernels import dispatch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_gives_the_numbers_of_float64(case: Case, dtype: torch.dtype):
    assert dispatch.runs_triton(*case.inputs(dtype))
    found = errors(case, dtype)
    print(case.name, dtype, found)
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.parametrize("case", [case for case in CASES if case.num_differentiable > 1], ids=lambda case: case.name)
def test_frozen_modulations_and_weights_change_no_other_gradient(case: Case):
    x, *others = case.inputs(torch.float32)
    (alone,) = torch.autograd.grad(case.operation(x.requires_grad_(), *others).sum(), x)
    for tensor in others[: case.num_differentiable - 1]:
        tensor.requires_grad_()
    assert torch.equal(alone, torch.autograd.grad(case.operation(x, *others).sum(), x)[0])
