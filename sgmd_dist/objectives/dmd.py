"""Distribution matching distillation, DMD (arXiv 2311.18828): one step, held to the teacher by noise/sample pairs.

    L_G = ½ MSE(x_g, sg(x_g - g)) + regression_weight MSE(G(z), y)

x_g = G(ε) is a sample of fresh noise in one step, g the normalized difference of the scores (section 3.2), and (z, y)
are pairs of the shards: y is what the guided teacher's chain of many steps makes of the noise z (section 3.3; made by
`launch/prepare.py pairs`). The paper compares G(z) and y as pictures, by LPIPS; here they are compared as latents, by
their mean squared error, so that no decoder is needed. Its weight is the paper's all the same, 0.25, for want of a
better one: the two distances have different scales.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.batch import Batch
from sgmd_dist.objectives._distillation import Distillation, DistillationSection, score_metrics
from sgmd_dist.objectives.base import Losses, Passes, StepState, pairs_of, per_sample_mean
from sgmd_dist.objectives.dmd2 import dmd_gradient, dmd_loss
from sgmd_dist.roles import Roles
from sgmd_dist.schedule import NonNegative, constant


class Section(DistillationSection):
    """`objective` section of DMD. The pairs are samples of one step, and so is what the generator makes.

    regression_weight: of the pairs' regression; 0 throughout needs no pairs.
    inner_sample: `reuse` is the paper's (its algorithm 1).
    """

    name: Literal["dmd"] = "dmd"
    student_steps: Literal[1] = Field(
        default=1, description="1: a pair is a sample of one step; dmd2 trains generators of several"
    )
    rollout: Literal["euler"] = "euler"
    inner_sample: Literal["fresh", "reuse"] = "reuse"
    regression_weight: NonNegative = constant(0.25)


def regression_loss(x0: Tensor, x0_teacher: Tensor) -> Tensor:
    """MSE(G(z), sg y) per sample, `[B]`: the regression of DMD (arXiv 2311.18828, section 3.3), on latents."""
    return per_sample_mean((x0 - x0_teacher.detach()) ** 2)


def build(section: Section) -> Dmd:
    """The objective of a recipe's section."""
    return Dmd(section)


class Dmd(Distillation):
    """DMD: the generator follows the difference of the scores, and on the pairs' noise the teacher's samples."""

    section: Section

    def __init__(self, section: Section) -> None:
        super().__init__(section)
        if max(section.regression_weight.values()) > 0:
            self.needs_pairs = "objective.regression_weight > 0"

    def generator_loss(self, roles: Roles, batch: Batch, state: StepState, x_g: Tensor) -> Losses:
        with torch.no_grad():
            _, x0_fake, x0_teacher, n = self.generator_scores(roles, batch, state, x_g)
            gradient = dmd_gradient(x0_fake, x0_teacher, n)
        loss = dmd_loss(x_g, gradient)
        metrics = {"generator/dmd": loss.detach(), **score_metrics(x_g, x0_fake, x0_teacher, n)}
        weight = self.section.regression_weight.at(state.step)
        if weight > 0:
            regression = self._regression(roles, batch)
            loss = loss + weight * regression
            metrics["generator/regression"] = regression.detach()
        return Losses(loss, metrics)

    def _regression(self, roles: Roles, batch: Batch) -> Tensor:
        noise, x0_teacher = pairs_of(batch, self.needs_pairs)
        sigma = torch.ones(batch.size, device=noise.device)
        velocity = roles["generator"](noise, sigma, batch.condition, 1.0)
        return regression_loss(flow.x0_from_velocity(noise, velocity, sigma), x0_teacher)

    def _generator_passes(self, step: int) -> tuple[Passes, ...]:
        regressed = (Passes("generator", "weights"),) if self.section.regression_weight.at(step) > 0 else ()
        return (*super()._generator_passes(step), *regressed)
