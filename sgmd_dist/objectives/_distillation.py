"""What score-distillation objectives share: their recipe keys, rollouts, renoising, guided teacher, cadence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sgmd_dist import flow, rng
from sgmd_dist.batch import Batch
from sgmd_dist.models.base import Gradient
from sgmd_dist.motion import latent_motion
from sgmd_dist.objectives.base import Losses, Passes, Phase, StepState, latents_of, per_sample_mean
from sgmd_dist.recipe import ObjectiveSection, wrong
from sgmd_dist.roles import Role, Roles
from sgmd_dist.rollout import GuidanceMode, backward_simulation, guided
from sgmd_dist.schedule import AtLeastOne, Positive, UnitInterval, constant

NORMALIZER_EPS = 1e-8


class DistillationSection(ObjectiveSection):
    """Keys of every objective that distils a teacher with the help of a fake score.

    guidance_scale: of the teacher, diffusers' convention: 1.0 = none.
    guidance: the guided teacher's two conditions as one `batched` forward or two `separate` ones; equal results.
    student_steps, sigma_shift: the few-step chain's length K and time shift.
    rollout: how samples come about: `euler` steps, `renoise` between steps, or `data`: real latents noised to
        the exit step (no rollout; needs shards with latents).
    exit_draw: `independent` draws per exit group, or `stratified`: the groups share out the steps of the chain.
    exit_weights: how often independent draws exit at each of the `student_steps` steps, up to a factor; None: all
        equally often.
    sigma_min, sigma_max: clamp of the renoising levels, drawn with the same time shift.
    fake_updates: fake-score updates after each generator update.
    inner_sample: `fresh` rolls out new samples for each fake update; `reuse` takes the generator phase's.
    """

    guidance_scale: Positive = constant(3.0)
    guidance: GuidanceMode = "batched"
    student_steps: int = Field(4, ge=1)
    sigma_shift: float = Field(5.0, gt=0)
    rollout: Literal["euler", "renoise", "data"] = "euler"
    exit_draw: Literal["independent", "stratified"] = "independent"
    exit_weights: list[Annotated[float, Field(ge=0)]] | None = None
    sigma_min: UnitInterval = constant(0.02)
    sigma_max: UnitInterval = constant(0.98)
    fake_updates: AtLeastOne = constant(1)
    inner_sample: Literal["fresh", "reuse"] = "fresh"

    @model_validator(mode="after")
    def _sigma_range(self) -> DistillationSection:
        highest, lowest = max(self.sigma_min.values()), min(self.sigma_max.values())
        if highest > lowest:
            raise wrong(
                f"sigma_min reaches {highest:g}, sigma_max goes down to {lowest:g}: expected sigma_min <= sigma_max at"
                " every step"
            )
        return self

    @model_validator(mode="after")
    def _a_group_for_each_exit(self) -> DistillationSection:
        if self.exit_draw == "stratified" and self.exit_groups < self.max_exits():
            raise wrong(
                f"exit_draw = stratified, exit_groups = {self.exit_groups}: expected at least {self.max_exits()}"
                " groups, one for each step at which a rollout may exit; or set exit_draw to independent"
            )
        return self

    @model_validator(mode="after")
    def _a_weight_for_each_exit(self) -> DistillationSection:
        weights = self.exit_weights
        if weights is None:
            return self
        if len(weights) != self.student_steps or weights[-1] == 0:
            raise wrong(
                f"exit_weights = {weights}: expected {self.student_steps} numbers, one for each of student_steps, the"
                " last above 0, since samples leave the chain there"
            )
        if self.exit_draw == "stratified":
            raise wrong(
                f"exit_weights = {weights}, exit_draw = stratified: shared-out exits are all as frequent; set exit_draw"
                " to independent or remove exit_weights"
            )
        return self

    def max_exits(self) -> int:
        """At how many steps of the chain a rollout may exit, at most, over the whole training."""
        return self.student_steps

    def num_fake_updates(self, step: int) -> int:
        return round(self.fake_updates.at(step))


@dataclass(frozen=True)
class Renoised:
    """Samples brought to noise levels: x_sigma = (1 - sigma) x0 + sigma noise. `level`: see `flow`."""

    x_sigma: Tensor
    sigma: Tensor
    noise: Tensor
    level: float


class Distillation:
    """Base of the objectives: one generator update on `generator_loss`, then the fake score's updates.

    `score_gradient`, `teacher_gradient`: what the generator's loss differentiates the fake score and the teacher for.
    """

    score_gradient: Gradient = "none"
    teacher_gradient: Gradient = "none"
    needs_pairs: str | None = None

    def __init__(self, section: DistillationSection) -> None:
        self.roles = {"teacher": False, "generator": True, "fake_score": True}
        self.needs_latents = "objective.rollout = data" if section.rollout == "data" else None
        self.section = section
        self.sigmas = flow.sampling_sigmas(section.student_steps, section.sigma_shift)

    def phases(self, step: int) -> Sequence[Phase]:
        reuse = self.section.inner_sample == "reuse"
        fake_passes = (*(() if reuse else self._rollout_passes(step, "none")), self.fake_pass(step))
        fake = [
            Phase("fake_score", partial(self._fake_phase, update=i), "same" if reuse else "next", fake_passes)
            for i in range(self.section.num_fake_updates(step))
        ]
        return [Phase("generator", self._generator_phase, passes=self._generator_passes(step)), *fake]

    def generator_loss(self, roles: Roles, batch: Batch, state: StepState, x_g: Tensor) -> Losses:
        """The generator's loss on its sample `x_g` `[B, C, F, H, W]`, which carries the graph."""
        raise NotImplementedError

    def fake_loss(self, velocity: Tensor, noise: Tensor, x_g: Tensor, step: int) -> Tensor:
        """The fake score's loss per sample `[B]` at the velocity that it predicts."""
        return fake_score_loss(velocity, noise, x_g)

    def fake_losses(
        self, roles: Roles, batch: Batch, state: StepState, x_g: Tensor, at: Renoised, update: int
    ) -> Losses:
        """The fake score's loss on generated samples `x_g`, which have no graph, renoised to `at`."""
        velocity = roles["fake_score"](at.x_sigma, at.sigma, batch.condition, at.level)
        loss = self.fake_loss(velocity, at.noise, x_g, state.step)
        return Losses(loss, {"fake_score/loss": loss.detach()})

    def fake_pass(self, step: int) -> Passes:
        """The pass of `fake_losses`."""
        return Passes("fake_score", "weights")

    def score_pass(self, step: int) -> Passes:
        """The fake score's pass in the generator's phase."""
        return Passes("fake_score", self.score_gradient)

    def extra_generator_loss(self, roles: Roles, batch: Batch, state: StepState, noise: Tensor) -> ExtraLoss | None:
        """A loss on the generator's first step; None where the objective has none at this step."""
        return None

    def extra_passes(self, step: int) -> tuple[Passes, ...]:
        """The passes of `extra_generator_loss`; none where it is None."""
        return ()

    def min_exit(self, step: int) -> int:
        """The first step of the chain at which a rollout may exit, at optimizer step `step`."""
        return 0

    def _generator_passes(self, step: int) -> tuple[Passes, ...]:
        extra = self.extra_passes(step)
        rollout = self._rollout_passes(step, "weights", first_is_known=bool(extra))
        scores = (self.score_pass(step), *self.teacher_passes(step, gradient=self.teacher_gradient))
        return (*extra, *rollout, *scores)

    def _rollout_passes(self, step: int, gradient: Gradient, *, first_is_known: bool = False) -> tuple[Passes, ...]:
        """Of `_rollout`: steps without a graph up to the exit, and the exit's pass with `gradient`."""
        if self.section.rollout == "data":
            return (Passes("generator", gradient),)
        weights = self._exit_weights(step)
        exits = range(self.section.student_steps)
        before = [max(index - first_is_known, 0) for index in exits]
        at_exit = [0 if index == 0 and first_is_known else 1 for index in exits]

        def mean(counts: list[int]) -> float:
            return sum(w * count for w, count in zip(weights, counts, strict=True)) / sum(weights)

        return (
            Passes("generator", "none", mean(before), before[-1]),
            Passes("generator", gradient, mean(at_exit), at_exit[-1]),
        )

    def _exit_weights(self, step: int) -> list[float]:
        """How often a rollout exits at each step of the chain, up to a factor; 0 below `min_exit`."""
        weights = self.section.exit_weights or [1.0] * self.section.student_steps
        first = self.min_exit(step)
        return [0.0] * first + weights[first:]

    def teacher_passes(self, step: int, evaluations: int = 1, gradient: Gradient = "none") -> tuple[Passes, ...]:
        """So many evaluations of `teacher_velocity`."""
        if self.section.guidance_scale.at(step) == 1.0:
            return (Passes("teacher", gradient, evaluations, evaluations),)
        if self.section.guidance == "batched":
            return (Passes("teacher", gradient, evaluations, evaluations, batch=2),)
        return (Passes("teacher", gradient, 2 * evaluations, 2 * evaluations),)

    def _generator_phase(self, roles: Roles, batch: Batch, state: StepState) -> Losses:
        noise = draw_noise("rollout", batch, state)
        extra = self.extra_generator_loss(roles, batch, state, noise)
        x_g = self._rollout(roles, batch, state, "rollout", noise, None if extra is None else extra.first_velocity)
        if self.section.inner_sample == "reuse":
            state.samples[state.unit_index] = x_g.detach()
        losses = self.generator_loss(roles, batch, state, x_g)
        losses.metrics["generator/latent_motion"] = latent_motion(x_g)
        if extra is not None:
            losses.per_sample = losses.per_sample + extra.weight * extra.per_sample
            losses.metrics["generator/diversity"] = extra.per_sample.detach()
        return losses

    def _fake_phase(self, roles: Roles, batch: Batch, state: StepState, *, update: int) -> Losses:
        if self.section.inner_sample == "reuse":
            x_g = state.samples[state.unit_index]
        else:
            purpose = "fake_rollout"
            noise = draw_noise(purpose, batch, state, update)
            with torch.no_grad():
                x_g = self._rollout(roles, batch, state, purpose, noise, None, update)
        at = self.renoise([roles["fake_score"]], x_g, batch, state, "fake", update)
        return self.fake_losses(roles, batch, state, x_g, at, update)

    def _rollout(
        self,
        roles: Roles,
        batch: Batch,
        state: StepState,
        purpose: str,
        noise: Tensor,
        first_velocity: Tensor | None,
        update: int = 0,
    ) -> Tensor:
        exit_index = self.exit_index(state, purpose, update)
        generator = guided(roles["generator"], batch.condition, batch.negative_embeds, 1.0)
        if self.section.rollout == "data":
            level = self.sigmas[exit_index]
            sigma = torch.full((batch.size,), level, device=noise.device)
            x = flow.add_noise(latents_of(batch, self.needs_latents), noise, sigma)
            return flow.x0_from_velocity(x, generator(x, sigma, level), sigma)

        def fresh_noise(i: int) -> Tensor:
            return draw_noise(f"{purpose}/renoise", batch, state, update, i)

        renoise = fresh_noise if self.section.rollout == "renoise" else None
        return backward_simulation(
            generator, noise, self.sigmas, exit_index, renoise=renoise, first_velocity=first_velocity
        )

    def exit_index(self, state: StepState, purpose: str, update: int = 0) -> int:
        """The exit step of the current micro-batch: a draw per exit group, equal on all ranks."""
        section = self.section
        first, group = self.min_exit(state.step), state.group(section.exit_groups)
        choices = section.student_steps - first
        if section.exit_draw == "independent":
            counters = (state.seed, f"{purpose}/exit", state.step, group, update)
            if section.exit_weights is not None:
                return rng.choice(self._exit_weights(state.step), *counters)
            return first + rng.integer(choices, *counters)
        round_number, place = divmod(group, choices)
        order = rng.permutation(choices, state.seed, f"{purpose}/exit", state.step, round_number, update)
        return first + order[place]

    def renoise(
        self, roles: Sequence[Role], x_g: Tensor, batch: Batch, state: StepState, purpose: str, update: int = 0
    ) -> Renoised:
        """x_g at random noise levels with fresh noise, one level per sample; keeps x_g's graph.

        Args:
            roles: those to be run at these levels: one expert of each serves the whole batch.
        """
        section = self.section
        levels = (section.sigma_shift, section.sigma_min.at(state.step), section.sigma_max.at(state.step))
        boundaries = {boundary for role in roles for boundary in role.boundaries}
        parts = flow.renoise_sections(boundaries, *levels)
        steps = parts[0] if len(parts) == 1 else self._expert_draw(parts, state, purpose, update)
        u = rng.sample_uniform(state.seed, f"{purpose}/sigma", batch.ids, update, device=x_g.device)
        sigma = flow.renoise_sigma(u, *levels, steps).float()
        noise = draw_noise(f"{purpose}/noise", batch, state, update)
        level = flow.renoise_level(steps.start, *levels)
        return Renoised(flow.add_noise(x_g, noise, sigma), sigma, noise, level)

    def _expert_draw(self, parts: Sequence[range], state: StepState, purpose: str, update: int) -> range:
        """The timesteps of one expert, by their probability: a draw per exit group, equal on all ranks, since it
        decides whose weights they gather."""
        group = state.group(self.section.exit_groups)
        drawn = rng.integer(flow.NUM_TRAIN_TIMESTEPS, state.seed, f"{purpose}/expert", state.step, group, update)
        return next(part for part in parts if drawn in part)

    def scores(self, roles: Roles, batch: Batch, state: StepState, at: Renoised) -> tuple[Tensor, Tensor]:
        """x0-predictions (fake, guided teacher) at `at.x_sigma`; see `teacher_x0`."""
        fake = roles["fake_score"](at.x_sigma, at.sigma, batch.condition, at.level)
        return flow.x0_from_velocity(at.x_sigma, fake, at.sigma), self.teacher_x0(roles, batch, state, at)

    def teacher_x0(self, roles: Roles, batch: Batch, state: StepState, at: Renoised) -> Tensor:
        """The guided teacher's x0-prediction at `at.x_sigma`, with a gradient where `teacher_gradient` is `input`."""
        through_input = torch.is_grad_enabled() and self.teacher_gradient == "input"
        x_sigma = at.x_sigma if through_input else at.x_sigma.detach()
        with torch.set_grad_enabled(through_input):
            teacher = self.teacher_velocity(roles, batch, state)(x_sigma, at.sigma, at.level)
        return flow.x0_from_velocity(x_sigma, teacher, at.sigma)

    def generator_scores(
        self, roles: Roles, batch: Batch, state: StepState, x_g: Tensor
    ) -> tuple[Renoised, Tensor, Tensor, Tensor]:
        """The generator's sample renoised, the x0-predictions (fake, guided teacher) there, and n `[B]`."""
        at = self.renoise([roles["fake_score"], roles["teacher"]], x_g, batch, state, "generator")
        x0_fake, x0_teacher = self.scores(roles, batch, state, at)
        return at, x0_fake, x0_teacher, teacher_distance(x_g, x0_teacher)

    def teacher_velocity(self, roles: Roles, batch: Batch, state: StepState) -> flow.Velocity:
        """The guided teacher as a function of (x, sigma, level)."""
        scale = self.section.guidance_scale.at(state.step)
        return guided(roles["teacher"], batch.condition, batch.negative_embeds, scale, self.section.guidance)


@dataclass(frozen=True)
class ExtraLoss:
    """A loss per sample `[B]` on the generator's first step, and that step's velocity, which rollouts reuse."""

    per_sample: Tensor
    weight: float
    first_velocity: Tensor


def draw_noise(purpose: str, batch: Batch, state: StepState, *counters: int) -> Tensor:
    """Standard normal noise of the batch's latent shape, keyed by the samples' places in the stream."""
    device = batch.prompt_embeds.device
    return rng.sample_normal(batch.latent_shape, state.seed, purpose, batch.ids, *counters, device=device)


def teacher_distance(x_g: Tensor, x0_teacher: Tensor) -> Tensor:
    """n = mean |x_g - f_T| per sample, `[B]`, without gradient: the normalizer of DMD2 and SGMD."""
    return per_sample_mean((x_g.detach() - x0_teacher.detach()).abs())


def fake_score_loss(velocity_fake: Tensor, noise: Tensor, x_g: Tensor) -> Tensor:
    """Flow-matching loss of the fake score on generated samples, per sample: MSE(v_F, noise - sg x_g)."""
    return per_sample_mean((velocity_fake - flow.velocity_target(x_g.detach(), noise)) ** 2)


def score_metrics(x_g: Tensor, x0_fake: Tensor, x0_teacher: Tensor, normalizer: Tensor) -> dict[str, Tensor]:
    """What to watch, `[B]` each: the fake's tracking residual ½ (f_F - x_g)² / n and the gap mean |f_T - f_F|."""
    residual = per_sample_mean((x0_fake.detach() - x_g.detach()) ** 2) / (2 * (normalizer + NORMALIZER_EPS))
    return {
        "fake_score/residual": residual,
        "generator/teacher_fake_gap": per_sample_mean((x0_fake.detach() - x0_teacher).abs()),
        "generator/teacher_distance": normalizer,
    }
