"""Score identity Distillation, SiD (arXiv 2404.04057, section 4; few-step generators: arXiv 2505.12674).

With Δ = f_T - f_F of the x0-predictions at x_sigma, and gradients through both networks' inputs and x_g:

    L_G = ((1 - alpha) mean |Δ|² + mean Δᵀ (f_F - x_g)) / (n + 1e-8),   n = mean |x_g - f_T| without gradient

Score identity: where the fake score is ideal, f_F = E[x_g | x_sigma], E[u(x_sigma)ᵀ (f_F - x_g)] = 0 for every u. The
second term is zero on average then, and its gradient is that of a Fisher divergence, up to n:

    alpha = 1     of E ½ |Δ|² with the distribution of x_sigma held fixed: only the fake's own change counts
    alpha = ½     of E ½ |Δ|² whole

The papers sum over a sample's elements, here they are averaged, so that learning rates compare with DMD2's and SGMD's:
per sample, the gradient of x_g holds DMD2's (f_F - f_T) / n beside the terms with Jacobians. The weight 1 / n is that
of the papers, which write it with the 1-norm. n varies with x_g itself, which the identity leaves out; on wide latents
it tends to a function of sigma.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sgmd_dist.batch import Batch
from sgmd_dist.objectives._distillation import (
    NORMALIZER_EPS,
    Distillation,
    DistillationSection,
    score_metrics,
)
from sgmd_dist.objectives.base import Losses, StepState, per_sample_mean
from sgmd_dist.roles import Roles
from sgmd_dist.schedule import NonNegative, constant


class Section(DistillationSection):
    """`objective` section of SiD.

    alpha: how much of the Fisher term the loss takes away. 1.0, the default, is what the authors distil text-to-image
        models with; for one-step generators of small images they go up to 1.2.
    """

    name: Literal["sid"] = "sid"
    alpha: NonNegative = constant(1.0)


def fisher_term(x0_fake: Tensor, x0_teacher: Tensor, normalizer: Tensor) -> Tensor:
    """mean |f_T - f_F|² / (n + 1e-8) per sample `[B]`, with gradients to both predictions.

    Args:
        x0_fake, x0_teacher: `[B, ...]`.
        normalizer: n `[B]`, see `teacher_distance`.
    """
    return per_sample_mean((x0_teacher - x0_fake) ** 2) / (normalizer.detach() + NORMALIZER_EPS)


def identity_term(x_g: Tensor, x0_fake: Tensor, difference: Tensor, normalizer: Tensor) -> Tensor:
    """mean Δᵀ (f_F - x_g) / (n + 1e-8) per sample `[B]`, with gradients to all but n: the score identity's term.

    Args:
        x_g, x0_fake: `[B, ...]`.
        difference: Δ = f_T - f_F `[B, ...]`.
        normalizer: n `[B]`, see `teacher_distance`.
    """
    return per_sample_mean(difference * (x0_fake - x_g)) / (normalizer.detach() + NORMALIZER_EPS)


def build(section: Section) -> Sid:
    """The objective of a recipe's section."""
    return Sid(section)


class Sid(Distillation):
    """SiD: the score identity's term through both networks' inputs, and a share of the Fisher term beside it."""

    score_gradient = "input"
    teacher_gradient = "input"
    section: Section

    def generator_loss(self, roles: Roles, batch: Batch, state: StepState, x_g: Tensor) -> Losses:
        _, x0_fake, x0_teacher, n = self.generator_scores(roles, batch, state, x_g)
        fisher = fisher_term(x0_fake, x0_teacher, n)
        identity = identity_term(x_g, x0_fake, x0_teacher - x0_fake, n)
        loss = (1 - self.section.alpha.at(state.step)) * fisher + identity
        metrics = {
            "generator/fisher": fisher.detach() / 2,  # as SGMD writes it
            "generator/score_identity": identity.detach(),
            **score_metrics(x_g, x0_fake, x0_teacher.detach(), n),
        }
        return Losses(loss, metrics)
