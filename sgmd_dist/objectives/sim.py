"""Score Implicit Matching, SIM, with the pseudo-Huber distance (arXiv 2410.16794, sections 3.2 and 3.3).

With Δ = f_T - f_F of the x0-predictions at x_sigma, and gradients through both networks' inputs and x_g:

    L_G = mean d'(Δ)ᵀ (f_F - x_g) / (n + 1e-8),   n = mean |x_g - f_T| without gradient
    d'(Δ) = Δ / sqrt(1 + |Δ|² / c²),   the gradient of the pseudo-Huber distance d(Δ) = c² (sqrt(1 + |Δ|² / c²) - 1)

|Δ| is the norm of a whole sample. Where the fake score is ideal, the loss has the gradient of E d(Δ) with the
distribution of x_sigma held fixed, up to n (see `sid` on n and the score identity). c -> infinity gives SiD at
alpha = 1.

The paper's d' = Δ / sqrt(|Δ|² + c²) is this one over c, its Δ is one of scores, which x0-predictions give up to a
function of sigma, and its weight another such function. The norm of a sample grows with the root of its number of
elements, so c = huber_c sqrt(numel): huber_c is the root mean square of Δ at which d' turns from Δ itself to c Δ / |Δ|,
whatever the size of the latents. As for SiD, elements are averaged and weighted by 1 / n, for learning rates that
compare with DMD2's and SGMD's.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sgmd_dist.batch import Batch
from sgmd_dist.objectives._distillation import Distillation, DistillationSection, score_metrics
from sgmd_dist.objectives.base import Losses, StepState, per_sample_mean
from sgmd_dist.objectives.sid import fisher_term, identity_term
from sgmd_dist.roles import Roles
from sgmd_dist.schedule import Positive, constant


class Section(DistillationSection):
    """`objective` section of SIM.

    huber_c: pseudo-Huber constant per root of the number of elements, in the latents' unit.
    """

    name: Literal["sim"] = "sim"
    huber_c: Positive = constant(0.1)


def huber_shrinkage(difference: Tensor, huber_c: float) -> Tensor:
    """What d' leaves of Δ: d'(Δ) / Δ = 1 / sqrt(1 + mean Δ² / huber_c²) per sample `[B]`, with its gradient.

    Args:
        difference: Δ `[B, ...]`.
        huber_c: c / sqrt(numel) > 0.
    """
    return (1 + per_sample_mean(difference**2) / huber_c**2).rsqrt()


def build(section: Section) -> Sim:
    """The objective of a recipe's section."""
    return Sim(section)


class Sim(Distillation):
    """SIM: the score identity's term along the gradient of a robust distance, which is Δ shrunk."""

    score_gradient = "input"
    teacher_gradient = "input"
    section: Section

    def generator_loss(self, roles: Roles, batch: Batch, state: StepState, x_g: Tensor) -> Losses:
        _, x0_fake, x0_teacher, n = self.generator_scores(roles, batch, state, x_g)
        difference, huber_c = x0_teacher - x0_fake, self.section.huber_c.at(state.step)
        identity, shrinkage = identity_term(x_g, x0_fake, difference, n), huber_shrinkage(difference, huber_c)
        metrics = {
            "generator/fisher": fisher_term(x0_fake, x0_teacher, n).detach() / 2,  # as SGMD writes it
            "generator/score_identity": identity.detach(),
            "generator/huber_shrinkage": shrinkage.detach(),
            **score_metrics(x_g, x0_fake, x0_teacher.detach(), n),
        }
        return Losses(shrinkage * identity, metrics)
