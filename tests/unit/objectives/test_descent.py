"""Whole generator phases bring a one-step generator x_g = scale z + shift to its teacher, with an ideal fake score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation_world import make_batch, make_dmd2, make_sgmd, make_sid, make_sim
from torch import Tensor, nn

from sgmd_dist import flow
from sgmd_dist.objectives._distillation import Distillation
from sgmd_dist.objectives.base import StepState

TEACHER_STD, TEACHER_MEAN = 0.5, 0.3


class IdealScore(nn.Module):
    """The velocity of samples whose elements are independent N(shift, scale²)."""

    boundaries = ()

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (scale, shift))

    def forward(self, x_sigma: Tensor, sigma: Tensor, prompt_embeds: Tensor, level: float) -> Tensor:
        s = flow.expand(sigma.double(), x_sigma)
        a, variance = 1 - s, self.scale**2
        x0 = self.shift + a * variance / (a**2 * variance + s**2) * (x_sigma - a * self.shift)
        return flow.velocity_from_x0(x_sigma.double(), x0, s.flatten())


class OneStep(nn.Module):
    """x_g = scale z + shift in one step from sigma = 1."""

    boundaries = ()

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (scale, shift))

    def forward(self, x_sigma: Tensor, sigma: Tensor, prompt_embeds: Tensor, level: float) -> Tensor:
        return x_sigma.double() - (self.scale * x_sigma.double() + self.shift)


def descend(objective: Distillation, scale: float, shift: float, steps: int = 120) -> tuple[float, float]:
    """Scale and shift after Adam's steps on the generator's loss; the fake score is set to the ideal one each time."""
    generator, teacher, fake = OneStep(scale, shift), IdealScore(TEACHER_STD, TEACHER_MEAN), IdealScore(scale, shift)
    teacher.requires_grad_(False)
    fake.requires_grad_(False)
    roles: Any = {"teacher": teacher, "generator": generator, "fake_score": fake}
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.03, betas=(0.5, 0.9))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for step in range(steps):
        fake.load_state_dict(generator.state_dict())
        state = StepState(step=step, seed=7, num_units=1)
        losses = objective.phases(step)[0].loss(roles, make_batch(unit=step, size=16), state)
        optimizer.zero_grad()
        losses.per_sample.mean().backward()
        optimizer.step()
        decay.step()
    return generator.scale.item(), generator.shift.item()


ONE_STEP = {"student_steps": 1, "guidance_scale": 1.0}
OBJECTIVES = {
    "dmd2": lambda: make_dmd2(**ONE_STEP),
    "sgmd": lambda: make_sgmd(nr_weight=0.0, **ONE_STEP),
    "sid": lambda: make_sid(**ONE_STEP),
    "sid, alpha 1.2": lambda: make_sid(alpha=1.2, **ONE_STEP),
    "sim": lambda: make_sim(**ONE_STEP),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("start", [(0.25, -0.2), (1.0, 0.8)])
def test_the_generator_comes_to_the_teacher(name: str, start: tuple[float, float]) -> None:
    scale, shift = descend(OBJECTIVES[name](), *start)
    assert (scale, shift) == (pytest.approx(TEACHER_STD, abs=1e-3), pytest.approx(TEACHER_MEAN, abs=1e-3))
