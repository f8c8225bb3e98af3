"""The fused operations on CPU: their formulas, their registration with torch, and what they say of wrong shapes."""

from __future__ import annotations

import pytest
import torch
from fused_cases import CASES, DTYPES, EPS, TOLERANCE, Case, errors
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sgmd_kernels import adaln, dispatch, qk_rope, residual, sgmd_loss

SMALL = [case for case in CASES if sum(tensor.numel() for tensor in case.inputs(torch.float32)) < 2000]
by_name = {"ids": lambda case: case.name}


def leaves(case: Case, dtype: torch.dtype) -> list[Tensor]:
    tensors = [tensor.to(dtype) for tensor in case.inputs(dtype)]
    return [tensor.requires_grad_(index < case.num_differentiable) for index, tensor in enumerate(tensors)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, **by_name)
def test_the_reference_gives_the_numbers_of_float64(case: Case, dtype: torch.dtype):
    found = errors(case, dtype)
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.parametrize("case", SMALL, **by_name)
def test_the_backward_formula_is_the_derivative(case: Case):
    assert torch.autograd.gradcheck(case.operation, leaves(case, torch.float64), fast_mode=True)


@pytest.mark.parametrize("case", SMALL, **by_name)
def test_the_registration_holds(case: Case):
    tensors = leaves(case, torch.float32)
    operation, *numbers = {
        "adaln": (adaln._adaln, EPS),
        "residual": (residual._gated_residual,),
        "rope": (qk_rope._rms_norm_rope, EPS),
        "loss": (sgmd_loss._outer_loss, 1.0, 0.1),
    }[case.name.split(":")[0]]
    torch.library.opcheck(operation, (*tensors, *numbers))


@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_registration_of_the_backward_operations_holds(with_gradients: bool):
    x, y, grad = torch.randn(3, 2, 5, 30)
    scale, shift = torch.randn(2, 2, 1, 30)
    cos, sin = torch.randn(2, 5, 5)
    torch.library.opcheck(adaln._adaln_backward, (grad, x, scale, shift, EPS, with_gradients))
    torch.library.opcheck(residual._gated_residual_backward, (grad, y, scale, with_gradients))
    torch.library.opcheck(qk_rope._rms_norm_rope_backward, (grad, x, scale[0, 0], cos, sin, EPS, with_gradients))


@pytest.mark.parametrize("case", SMALL, **by_name)
def test_compilation_and_checkpointing_change_nothing(case: Case):
    tensors = leaves(case, torch.float32)
    wanted = tensors[: case.num_differentiable]

    def gradients(function) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*tensors).sum(), wanted)

    eager = gradients(case.operation)
    compiled = gradients(torch.compile(case.operation, backend="aot_eager", fullgraph=True))
    checkpointed = gradients(lambda *inputs: checkpoint(case.operation, *inputs, use_reentrant=False))
    for one, other in ((eager, compiled), (eager, checkpointed)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("case", [case for case in SMALL if case.num_differentiable > 1], **by_name)
def test_a_frozen_input_takes_no_gradient(case: Case):
    tensors = leaves(case, torch.float32)
    (both,) = torch.autograd.grad(case.operation(*tensors).sum(), tensors[:1])
    x, *frozen = (tensor.detach() for tensor in tensors)
    x.requires_grad_()
    case.operation(x, *frozen).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, both)
    assert all(tensor.grad is None for tensor in frozen)


def test_only_the_loss_carries_a_gradient():
    x0_fake, x0_teacher, x_g = torch.randn(3, 2, 4).requires_grad_().unbind()
    n, sigma = torch.rand(2, 2)
    result = sgmd_loss.outer_loss(x0_fake, x0_teacher, x_g, n, sigma, fisher_weight=1.0, nr_weight=0.1)
    assert result.loss.requires_grad and not result.fisher.requires_grad and not result.nr.requires_grad


def test_a_half_precision_cotangent_keeps_the_small_numbers():
    """2^-26 is below float16's smallest number: only the gradient, scaled as the loss is, may be rounded."""
    x0_fake = torch.full((1, 2**18), 2.0**-8, dtype=torch.float16).requires_grad_()
    other = torch.zeros_like(x0_fake)
    result = sgmd_loss.outer_loss(x0_fake, other, other, torch.ones(1), torch.ones(1), fisher_weight=1.0, nr_weight=0.0)
    (gradient,) = torch.autograd.grad(result.loss * 2.0**16, x0_fake)
    assert gradient[0, 0].item() == 2.0**-10


WRONG = [
    (lambda x, row: adaln.adaln(x[0], row, row), r"x has shape \[5, 6\]: expected \[B, L, D\]"),
    (lambda x, row: adaln.adaln(x, row, row[:1]), r"shift has shape \[1, 1, 6\] beside x of \[2, 5, 6\]"),
    (lambda x, row: residual.gated_residual(x, x, x[:, :2]), r"gate has shape \[2, 2, 6\]"),
    (lambda x, row: residual.gated_residual(x, row, row), r"y has shape \[2, 1, 6\] beside x of \[2, 5, 6\]"),
    (lambda x, row: qk_rope.rms_norm_rope(x, x[0, 0, :3], x[0], x[0], eps=EPS), r"weight \[3\]: expected"),
    (lambda x, row: qk_rope.rms_norm_rope(x, x[0, 0], x[0, :, :2], x[0, :, :2], eps=EPS), r"expected \[5, H/2\]"),
    (lambda x, row: sgmd_loss.outer_loss(x, x, x[:1], x, x, fisher_weight=1, nr_weight=1), "expected equal ones"),
    (lambda x, row: sgmd_loss.outer_loss(x, x, x, x, x, fisher_weight=1, nr_weight=1), r"expected \[2\], one per"),
]


@pytest.mark.parametrize("call, message", WRONG)
def test_shapes_that_do_not_fit_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 5, 6), torch.randn(2, 1, 6))


@pytest.mark.parametrize(
    "setting, device, installed, expected",
    [
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
        ("auto", "cpu", True, False),
        ("off", "cuda", True, False),
    ],
)
def test_fused_operations_run_where_the_recipe_the_device_and_triton_allow(setting, device, installed, expected):
    assert dispatch.fused(setting, device, installed) is expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_dtype_that_kernels_do_not_read_takes_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    assert dispatch.runs_triton(torch.ones(3))
    assert not dispatch.runs_triton(torch.ones(3), torch.ones(3, dtype=dtype))
    assert not dispatch.runs_triton(torch.ones(0))
