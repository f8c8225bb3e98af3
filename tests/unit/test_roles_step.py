"""The end of a phase: clipping, the optimizer's step and the moving average, each by its number at that step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sgmd_dist.recipe import OptimSection
from sgmd_dist.roles import Roles, build_roles


def make_roles(**optim: Any) -> Roles:
    torch.manual_seed(0)
    modules: dict[str, Any] = {"generator": (nn.Linear(4, 2, bias=False), None)}
    plain = {"lr": 0.1, "betas": [0.0, 0.999], "weight_decay": 0.0, "eps": 1e3}  # so large that a step is lr grad / eps
    section = OptimSection.model_validate({"generator": plain, **optim})
    return build_roles(modules, {"generator"}, section, 10, recomputes=False)


def step(roles: Roles, number: int, gradient: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step; returns the weight's change and the norm that was reported."""
    weight = roles["generator"].module.weight
    assert isinstance(weight, nn.Parameter)
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, gradient)
    norm = roles.step("generator", number)
    assert weight.grad is None
    return weight.detach() - before, norm


@pytest.mark.parametrize("number, limit", [(0, 1.0), (2, 2.0), (4, 3.0)])
def test_gradients_are_clipped_to_the_norm_of_that_step(number: int, limit: float) -> None:
    roles = make_roles(max_grad_norm={"schedule": "linear", "from": 1.0, "to": 3.0, "steps": 4})
    change, norm = step(roles, number, 5.0)
    assert norm.item() == pytest.approx(5 * 8**0.5), "the norm before clipping"
    assert change.norm().item() == pytest.approx(0.1 * limit / 1e3, rel=1e-2)


def test_zero_means_no_clipping() -> None:
    change, _ = step(make_roles(max_grad_norm=0.0), 0, 5.0)
    assert change.norm().item() == pytest.approx(0.1 * 5 * 8**0.5 / 1e3, rel=2e-2)


def test_the_average_is_a_copy_before_its_start_step_and_moves_slowly_from_then_on() -> None:
    roles = make_roles(ema={"decay": 0.9, "start_step": 2}, max_grad_norm=0.0)
    weight, ema = roles["generator"].module.weight, roles["generator"].ema
    assert isinstance(weight, nn.Parameter) and ema is not None
    for number in (0, 1):
        step(roles, number, 50.0)
        torch.testing.assert_close(ema.shadow["weight"], weight.detach(), rtol=0, atol=0)
    before = ema.shadow["weight"].clone()
    step(roles, 2, 50.0)
    torch.testing.assert_close(ema.shadow["weight"], 0.9 * before + 0.1 * weight.detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_nothing(bad: float) -> None:
    """The steps before and after are as if they had followed each other."""
    quiet, disturbed = (make_roles(ema={"decay": 0.9}) for _ in range(2))
    for number, gradient in ((0, 5.0), (1, -3.0)):
        expected, _ = step(quiet, number, gradient)
        if number == 1:
            change, norm = step(disturbed, number, bad)
            assert not norm.isfinite() and not change.any()
        change, norm = step(disturbed, number, gradient)
        assert torch.equal(change, expected) and norm.isfinite()
    role, optimizer = disturbed["generator"], disturbed["generator"].optimizer
    assert optimizer is not None
    assert [float(state["step"]) for state in optimizer.state.values()] == [2.0]
    assert all(tensor.isfinite().all() for state in optimizer.state.values() for tensor in state.values())
    assert role.ema is not None and role.ema.shadow["weight"].isfinite().all()


def test_a_role_runs_with_its_average_for_a_while_and_then_is_as_before_bit_by_bit() -> None:
    roles = make_roles(ema={"decay": 0.9})
    step(roles, 0, 5.0)
    role = roles["generator"]
    assert role.ema is not None
    weight, shadow = role.parameters["weight"], role.ema.shadow["weight"]
    before, average = weight.detach().clone(), shadow.clone()
    assert not torch.equal(before, average)

    def sample(fails: bool) -> None:
        with role.averaged():
            assert torch.equal(weight, average) and torch.equal(shadow, before)
            if fails:
                raise RuntimeError("amid the samples")

    sample(fails=False)
    with pytest.raises(RuntimeError, match="amid the samples"):
        sample(fails=True)
    assert torch.equal(weight, before) and torch.equal(shadow, average)
