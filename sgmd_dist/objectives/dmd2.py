"""Improved distribution matching distillation, DMD2 (arXiv 2405.14867), without the GAN head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.batch import Batch
from sgmd_dist.objectives._distillation import (
    NORMALIZER_EPS,
    Distillation,
    DistillationSection,
    score_metrics,
    teacher_distance,
)
from sgmd_dist.objectives.base import Losses, StepState, per_sample_mean
from sgmd_dist.roles import Roles
from sgmd_dist.schedule import AtLeastOne, constant


class Section(DistillationSection):
    """`objective` section of DMD2; five fake-score updates per generator update unless told otherwise."""

    name: Literal["dmd2"] = "dmd2"
    fake_updates: AtLeastOne = constant(5)


def dmd_gradient(x0_fake: Tensor, x0_teacher: Tensor, normalizer: Tensor) -> Tensor:
    """The direction (f_F - f_T) / n of distribution matching (DMD, arXiv 2311.18828, equations 7 and 8)."""
    return (x0_fake - x0_teacher) / flow.expand(normalizer + NORMALIZER_EPS, x0_fake)


def dmd_loss(x_g: Tensor, gradient: Tensor) -> Tensor:
    """½ MSE(x_g, sg(x_g - gradient)) per sample: its gradient with respect to x_g is `gradient` / numel."""
    return per_sample_mean((x_g - (x_g - gradient).detach()) ** 2) / 2


def fake_score_loss(velocity_fake: Tensor, noise: Tensor, x_g: Tensor) -> Tensor:
    """Flow-matching loss of the fake score on generated samples, per sample: MSE(v_F, noise - sg x_g)."""
    return per_sample_mean((velocity_fake - flow.velocity_target(x_g.detach(), noise)) ** 2)


def build(section: Section) -> Dmd2:
    """The objective of a recipe's section."""
    return Dmd2(section)


class Dmd2(Distillation):
    """DMD2: the generator follows the difference of the scores, the fake score tracks the generator."""

    def generator_loss(self, roles: Roles, batch: Batch, state: StepState, x_g: Tensor) -> Losses:
        with torch.no_grad():
            at = self.renoise([roles["fake_score"], roles["teacher"]], x_g, batch, state, "generator")
            x0_fake, x0_teacher = self.scores(roles, batch, state, at)
            n = teacher_distance(x_g, x0_teacher)
            gradient = dmd_gradient(x0_fake, x0_teacher, n)
        loss = dmd_loss(x_g, gradient)
        metrics = {"generator/dmd": loss.detach(), **score_metrics(x_g, x0_fake, x0_teacher, n)}
        return Losses(loss, metrics)

    def fake_loss(self, velocity: Tensor, noise: Tensor, x_g: Tensor, step: int) -> Tensor:
        return fake_score_loss(velocity, noise, x_g)
