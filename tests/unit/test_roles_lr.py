"""The learning rate of a step: the role's own schedule times the factor of `optim.schedule`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sgmd_dist.recipe import AdamWSection, LrScheduleSection
from sgmd_dist.roles import Role, lr_factor


def factors(steps: list[int], num_steps: int, **keys: Any) -> list[float]:
    section = LrScheduleSection.model_validate(keys)
    return [lr_factor(section, step, num_steps) for step in steps]


def test_constant_is_one() -> None:
    assert factors([0, 5, 99], 100) == [1, 1, 1]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warm_up_is_a_line_that_reaches_one_at_its_last_step(name: str) -> None:
    assert factors([0, 1, 2, 3, 4], 100, name=name, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_falls_to_the_final_ratio_at_the_end_of_the_run() -> None:
    assert factors([0, 25, 50, 99, 100], 100, name="linear") == pytest.approx([1, 0.75, 0.5, 0.01, 0])
    assert factors([0, 50, 100], 100, name="linear", final_ratio=0.2) == pytest.approx([1, 0.6, 0.2])
    assert factors([20, 60, 100], 100, name="linear", warmup_steps=20) == pytest.approx([1, 0.5, 0])


def test_cosine_falls_to_the_final_ratio_at_the_end_of_the_run() -> None:
    quarter = (1 + 0.5**0.5) / 2
    assert factors([0, 25, 50, 75, 100], 100, name="cosine") == pytest.approx([1, quarter, 0.5, 1 - quarter, 0])
    assert factors([0, 50, 100], 100, name="cosine", final_ratio=0.1) == pytest.approx([1, 0.55, 0.1])
    assert factors([20, 60, 100], 100, name="cosine", warmup_steps=20) == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 10, 100, 150])
def test_the_factor_is_positive_at_every_step_of_a_run_and_at_most_one(name: str, warmup_steps: int) -> None:
    values = factors(list(range(100)), 100, name=name, warmup_steps=warmup_steps)
    assert all(0 < value <= 1 for value in values)
    after = values[min(warmup_steps, 100) :]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_past_the_end_the_factor_stays_at_the_final_ratio(name: str) -> None:
    assert factors([100, 130, 200], 100, name=name, final_ratio=0.25) == pytest.approx([0.25, 0.25, 0.25])


def test_a_role_steps_with_its_own_schedule_times_the_factor() -> None:
    """Adam's first step moves a weight by the learning rate, whatever the gradient; so the move shows the rate."""
    ramp = {"schedule": "linear", "from": 0.1, "to": 0.3, "steps": 2}
    for step, expected in ((0, 0.05), (1, 0.1), (2, 0.15), (9, 0.15)):
        module = nn.Linear(1, 1, bias=False).double()
        role = Role("generator", module, model=None)  # type: ignore[arg-type]
        role.add_optimizer(AdamWSection.model_validate({"lr": ramp, "weight_decay": 0.0}))
        before = module.weight.item()
        module.weight.grad = torch.full_like(module.weight, 0.5)
        norm = role.step(step, max_grad_norm=0, lr_factor=0.5)
        assert before - module.weight.item() == pytest.approx(expected, rel=1e-6)
        assert norm.item() == 0.5 and module.weight.grad is None
