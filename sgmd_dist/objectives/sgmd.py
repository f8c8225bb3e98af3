"""Score Gradient Matching Distillation (arXiv 2605.30116).

Outer loop (generator):   L_G = fisher_weight Fisher - nr_weight NR, gradients through the fake score's input
Inner loop (fake score):  RC = rc_weight ½ MSE(v_F, noise - x_g)

Scores are compared as x0-predictions: f_F of the fake score, f_T of the guided teacher, at the renoised x_sigma.
In velocity space the residual's sign would be wrong wherever the fake's Jacobian is below the identity.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.batch import Batch
from sgmd_dist.objectives._distillation import (
    NORMALIZER_EPS,
    Distillation,
    DistillationSection,
    ExtraLoss,
    score_metrics,
)
from sgmd_dist.objectives.base import Losses, Passes, StepState, per_sample_mean
from sgmd_dist.recipe import Section as RecipeSection
from sgmd_dist.recipe import wrong
from sgmd_dist.roles import Roles
from sgmd_dist.schedule import NonNegative, constant
from sgmd_kernels.sgmd_loss import outer_loss


class DiversitySection(RecipeSection):
    """Pull of the generator's first step towards `steps` of `total_steps` guided teacher steps; 0 = off."""

    weight: NonNegative = constant(0.0)
    steps: int = Field(default=5, ge=1)
    total_steps: int = Field(default=30, ge=2)

    @model_validator(mode="after")
    def _fewer_steps(self) -> DiversitySection:
        if self.steps > self.total_steps:
            raise wrong(f"steps = {self.steps}: expected at most total_steps = {self.total_steps}")
        return self


class Section(DistillationSection):
    """`objective` section of SGMD: the loss schedule. nr_weight is the paper's lambda."""

    name: Literal["sgmd"] = "sgmd"
    fisher_weight: NonNegative = constant(1.0)
    nr_weight: NonNegative = constant(0.1)
    rc_weight: NonNegative = constant(1.0)
    diversity: DiversitySection = DiversitySection()

    def max_exits(self) -> int:
        always_diverse = min(self.diversity.weight.values()) > 0
        return max(self.student_steps - always_diverse, 1)


def fisher_loss(x0_fake: Tensor, x0_teacher: Tensor, normalizer: Tensor) -> Tensor:
    """Fisher term per sample: mean ½ (f_F - sg f_T)² / (n + 1e-8).

    Args:
        x0_fake: `[B, ...]`, with the graph through the fake score's input.
        x0_teacher: `[B, ...]`.
        normalizer: n `[B]`, see `teacher_distance`.
    """
    return per_sample_mean((x0_fake - x0_teacher.detach()) ** 2) / (2 * (normalizer.detach() + NORMALIZER_EPS))


def nr_loss(x0_fake: Tensor, x_g: Tensor, sigma: Tensor) -> Tensor:
    """Noise-residual term per sample: mean ½ (f_F - sg x_g)² / max(sigma, 1e-8).

    Its gradient with respect to f_F is r / numel with r = (f_F - x_g) / sigma, the cotangent of the paper.
    """
    return per_sample_mean((x0_fake - x_g.detach()) ** 2) / (2 * sigma.clamp_min(1e-8))


def rc_loss(velocity_fake: Tensor, noise: Tensor, x_g: Tensor) -> Tensor:
    """Residual-contraction term per sample: ½ MSE(v_F, noise - sg x_g)."""
    return per_sample_mean((velocity_fake - flow.velocity_target(x_g.detach(), noise)) ** 2) / 2


def alpha(normalizer: Tensor, sigma: Tensor, nr_weight: float, fisher_weight: float) -> Tensor:
    """alpha = nr_weight n / (fisher_weight sigma) per sample: the share of the fake's prediction that NR replaces
    by x_g, where there is a Fisher term to replace it in."""
    return nr_weight * normalizer / (fisher_weight * sigma.clamp_min(1e-8))


def build(section: Section) -> Sgmd:
    """The objective of a recipe's section."""
    return Sgmd(section)


class Sgmd(Distillation):
    """SGMD: Fisher matching through the fake score's Jacobian, NR as its brake, RC for the fake score."""

    score_gradient = "input"
    section: Section

    def generator_loss(self, roles: Roles, batch: Batch, state: StepState, x_g: Tensor) -> Losses:
        at, x0_fake, x0_teacher, n = self.generator_scores(roles, batch, state, x_g)
        fisher_weight, nr_weight = self.section.fisher_weight.at(state.step), self.section.nr_weight.at(state.step)
        if state.fused:
            weights = {"fisher_weight": fisher_weight, "nr_weight": nr_weight}
            loss, fisher, nr = outer_loss(x0_fake, x0_teacher, x_g, n, at.sigma, **weights)
        else:
            fisher, nr = fisher_loss(x0_fake, x0_teacher, n), nr_loss(x0_fake, x_g, at.sigma)
            loss = fisher_weight * fisher - nr_weight * nr
        metrics = {
            "generator/fisher": fisher.detach(),
            "generator/nr": nr.detach(),
            **score_metrics(x_g, x0_fake, x0_teacher, n),
        }
        if fisher_weight > 0:
            metrics["generator/alpha"] = alpha(n, at.sigma, nr_weight, fisher_weight)
        return Losses(loss, metrics)

    def fake_loss(self, velocity: Tensor, noise: Tensor, x_g: Tensor, step: int) -> Tensor:
        return self.section.rc_weight.at(step) * rc_loss(velocity, noise, x_g)

    def min_exit(self, step: int) -> int:
        return int(self.section.diversity.weight.at(step) > 0 and self.section.student_steps > 1)

    def extra_generator_loss(self, roles: Roles, batch: Batch, state: StepState, noise: Tensor) -> ExtraLoss | None:
        weight = self.section.diversity.weight.at(state.step)
        if weight == 0:
            return None
        target = self._diversity_target(roles, batch, state, noise)
        velocity = roles["generator"](noise, torch.ones(batch.size, device=noise.device), batch.condition, 1.0)
        return ExtraLoss(per_sample_mean((velocity - target) ** 2), weight, velocity)

    def extra_passes(self, step: int) -> tuple[Passes, ...]:
        diversity = self.section.diversity
        if diversity.weight.at(step) == 0:
            return ()
        return (*self.teacher_passes(step, diversity.steps), Passes("generator", "weights"))

    @torch.no_grad()
    def _diversity_target(self, roles: Roles, batch: Batch, state: StepState, noise: Tensor) -> Tensor:
        """The straight velocity from `noise` to where the guided teacher stands after its first steps."""
        diversity = self.section.diversity
        sigmas = flow.sampling_sigmas(diversity.total_steps, self.section.sigma_shift)[: diversity.steps + 1]
        x_a = flow.integrate(self.teacher_velocity(roles, batch, state), noise, sigmas)
        return (noise - x_a) / (1 - sigmas[-1])
