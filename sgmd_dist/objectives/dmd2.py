"""Improved distribution matching distillation, DMD2 (arXiv 2405.14867), with its GAN head as an option.

The GAN term (section 4.3) sets real latents against generated samples: a head on the fake score's blocks tells them
apart at the noise levels at which the fake score is trained. l is the head's logit, g a generated sample and r a real
latent, both renoised:

    generator    L_G + weight softplus(-l_g)
    fake score   L_F + fake_weight [ softplus(-l_r) + softplus(l_g) + r1_weight R1 ]
    R1           (l_r - l_r')² / r1_std²,   r' = r + r1_std N(0, I)

R1 is the gradient penalty |dl/dr|² (arXiv 1801.04406) by a finite difference, as in arXiv 2501.08316: for small
`r1_std` its expectation is that, and it needs no second derivatives, which kernels of attention do not have.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from sgmd_dist import flow
from sgmd_dist.batch import Batch
from sgmd_dist.conditions import joined
from sgmd_dist.objectives._distillation import (
    NORMALIZER_EPS,
    Distillation,
    DistillationSection,
    Renoised,
    draw_noise,
    score_metrics,
    teacher_distance,
)
from sgmd_dist.objectives.base import Losses, Passes, StepState, latents_of, per_sample_mean
from sgmd_dist.recipe import HeadSection
from sgmd_dist.roles import Roles
from sgmd_dist.schedule import AtLeastOne, NonNegative, constant


class GanSection(HeadSection):
    """The GAN term; there is no head, and nothing is read or run for it, unless `weight` is above 0 at some step.

    weight: of the generator's term; from 0 upwards by a schedule the head learns first. The authors' recipes have
        3e-3 to 5e-3.
    fake_weight: of the head's loss beside the fake score's own.
    r1_weight, r1_std: of the gradient penalty, and the noise that it is measured with, in units of the latents.
    trains_blocks: whether the head's loss trains the fake score's blocks too, as in the paper, or the head alone.
    """

    key: ClassVar[str] = "objective.gan"

    weight: NonNegative = constant(0.0)
    fake_weight: NonNegative = constant(0.01)
    r1_weight: NonNegative = constant(0.0)
    r1_std: float = Field(default=0.1, gt=0)
    trains_blocks: bool = True

    @property
    def is_on(self) -> bool:
        """True where the generator is to see the head at some step."""
        return max(self.weight.values()) > 0


class Section(DistillationSection):
    """`objective` section of DMD2; five fake-score updates per generator update unless told otherwise."""

    name: Literal["dmd2"] = "dmd2"
    fake_updates: AtLeastOne = constant(5)
    gan: GanSection = GanSection()

    def head_of(self, role: str) -> HeadSection | None:
        return self.gan if role == "fake_score" and self.gan.is_on else None


def dmd_gradient(x0_fake: Tensor, x0_teacher: Tensor, normalizer: Tensor) -> Tensor:
    """The direction (f_F - f_T) / n of distribution matching (DMD, arXiv 2311.18828, equations 7 and 8)."""
    return (x0_fake - x0_teacher) / flow.expand(normalizer + NORMALIZER_EPS, x0_fake)


def dmd_loss(x_g: Tensor, gradient: Tensor) -> Tensor:
    """½ MSE(x_g, sg(x_g - gradient)) per sample: its gradient with respect to x_g is `gradient` / numel."""
    return per_sample_mean((x_g - (x_g - gradient).detach()) ** 2) / 2


def gan_generator_loss(logit: Tensor) -> Tensor:
    """Non-saturating logistic loss of generated samples, -log D (DMD2, arXiv 2405.14867, section 4.3); `[B]` each."""
    return softplus(-logit)


def gan_head_loss(logit_real: Tensor, logit_generated: Tensor) -> Tensor:
    """Logistic loss of the head, -log D(real) - log(1 - D(generated)) (the same section); `[B]` each."""
    return softplus(-logit_real) + softplus(logit_generated)


def approximate_r1(logit: Tensor, logit_perturbed: Tensor, std: float) -> Tensor:
    """|dl/dx|² by a finite difference in a random direction (approximated R1, arXiv 2501.08316), `[B]`.

    Args:
        logit_perturbed: at x + std N(0, I), `[B]`. For small `std` the mean over that noise is the gradient's square.
    """
    return ((logit - logit_perturbed) / std) ** 2


def build(section: Section) -> Dmd2:
    """The objective of a recipe's section."""
    return Dmd2(section)


class Dmd2(Distillation):
    """DMD2: the generator follows the difference of the scores, the fake score tracks the generator; with the GAN term
    a head on the fake score sets real latents against its samples, and the generator's against the head."""

    section: Section

    def __init__(self, section: Section) -> None:
        super().__init__(section)
        if section.gan.is_on and self.needs_latents is None:
            self.needs_latents = "objective.gan.weight > 0"

    def generator_loss(self, roles: Roles, batch: Batch, state: StepState, x_g: Tensor) -> Losses:
        weight = self.section.gan.weight.at(state.step)
        with torch.set_grad_enabled(weight > 0):
            at = self.renoise([roles["fake_score"], roles["teacher"]], x_g, batch, state, "generator")
            if weight > 0:
                velocity, logit = roles["fake_score"].judge(at.x_sigma, at.sigma, batch.condition, at.level)
                x0_fake = flow.x0_from_velocity(at.x_sigma, velocity, at.sigma)
                x0_teacher = self.teacher_x0(roles, batch, state, at)
            else:
                logit = None
                x0_fake, x0_teacher = self.scores(roles, batch, state, at)
        n = teacher_distance(x_g, x0_teacher)
        loss = dmd_loss(x_g, dmd_gradient(x0_fake.detach(), x0_teacher, n))
        metrics = {"generator/dmd": loss.detach(), **score_metrics(x_g, x0_fake, x0_teacher, n)}
        if logit is not None:
            gan = gan_generator_loss(logit)
            loss = loss + weight * gan
            metrics["generator/gan"] = gan.detach()
        return Losses(loss, metrics)

    def fake_losses(
        self, roles: Roles, batch: Batch, state: StepState, x_g: Tensor, at: Renoised, update: int
    ) -> Losses:
        if not self._num_real(state.step):
            return super().fake_losses(roles, batch, state, x_g, at, update)
        gan, step = self.section.gan, state.step
        inputs = [at.x_sigma, *self._real_inputs(batch, state, at, update)]
        velocities, logits = roles["fake_score"].judge(
            torch.cat(inputs),
            at.sigma.repeat(len(inputs)),
            joined([batch.condition] * len(inputs)),
            at.level,
            detached=not gan.trains_blocks,
        )
        generated, real, *perturbed = logits.chunk(len(inputs))
        denoising = self.fake_loss(velocities[: batch.size], at.noise, x_g, step)
        loss = head_loss = gan_head_loss(real, generated)
        metrics = {
            "fake_score/loss": denoising.detach(),
            "fake_score/gan": head_loss.detach(),
            "fake_score/logit_real": real.detach(),
            "fake_score/logit_generated": generated.detach(),
        }
        if perturbed:
            r1 = approximate_r1(real, perturbed[0], gan.r1_std)
            loss = loss + gan.r1_weight.at(step) * r1
            metrics["fake_score/r1"] = r1.detach()
        return Losses(denoising + gan.fake_weight.at(step) * loss, metrics)

    def _real_inputs(self, batch: Batch, state: StepState, at: Renoised, update: int) -> list[Tensor]:
        """Real latents at the levels of `at`, and for R1 the same with a little noise more."""
        latents = latents_of(batch, self.needs_latents)
        real = flow.add_noise(latents, draw_noise("real/noise", batch, state, update), at.sigma)
        if self._num_real(state.step) == 1:
            return [real]
        return [real, real + self.section.gan.r1_std * draw_noise("real/r1", batch, state, update)]

    def _num_real(self, step: int) -> int:
        """Real samples that the head sees at `step` for each generated one: R1 takes a second one."""
        gan = self.section.gan
        is_judged = gan.is_on and gan.fake_weight.at(step) > 0
        return is_judged * (1 + (gan.r1_weight.at(step) > 0))

    def fake_pass(self, step: int) -> Passes:
        return Passes("fake_score", "weights", batch=1 + self._num_real(step))

    def score_pass(self, step: int) -> Passes:
        return Passes("fake_score", "input" if self.section.gan.weight.at(step) > 0 else "none")
