"""Flow matching on real latents (arXiv 2210.02747): trains a teacher, as the role `generator`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sgmd_dist import flow, rng
from sgmd_dist.batch import Batch
from sgmd_dist.conditions import Condition, with_text
from sgmd_dist.objectives.base import Losses, Passes, Phase, StepState, latents_of, per_sample_mean
from sgmd_dist.recipe import ObjectiveSection
from sgmd_dist.roles import Roles


class Section(ObjectiveSection):
    """`objective` section of flow matching.

    sigma_shift: time shift of the uniformly drawn noise levels.
    caption_dropout: share of samples that see the negative prompt instead, so that guidance works later.
    """

    name: Literal["flow_matching"] = "flow_matching"
    sigma_shift: float = Field(1.0, gt=0)
    caption_dropout: float = Field(0.1, ge=0, le=1)


def flow_matching_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """MSE(v, noise - x0) per sample, `[B]`."""
    return per_sample_mean((velocity - flow.velocity_target(x0, noise)) ** 2)


def build(section: Section) -> FlowMatching:
    """The objective of a recipe's section."""
    return FlowMatching(section)


class FlowMatching:
    """Regression of the velocity at random noise levels of real latents."""

    def __init__(self, section: Section) -> None:
        self.roles = {"generator": True}
        self.needs_latents = "objective.name = flow_matching"
        self.needs_pairs = None
        self.section = section

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase("generator", self._loss, passes=(Passes("generator", "weights"),))]

    def _loss(self, roles: Roles, batch: Batch, state: StepState) -> Losses:
        x0, seed = latents_of(batch, self.needs_latents), state.seed
        device = x0.device
        generator = roles["generator"]
        noise = rng.sample_normal(batch.latent_shape, seed, "flow/noise", batch.ids, device=device)
        lowest, highest = self._levels(generator.boundaries, state)
        u = rng.sample_uniform(seed, "flow/sigma", batch.ids, device=device)
        sigma = flow.shifted_sigma(u, self.section.sigma_shift, lowest, highest)
        velocity = generator(flow.add_noise(x0, noise, sigma), sigma, self._condition(batch, seed), lowest)
        loss = flow_matching_loss(velocity, x0, noise)
        return Losses(loss, {"generator/loss": loss.detach()})

    def _levels(self, boundaries: Sequence[float], state: StepState) -> tuple[float, float]:
        """The noise levels of one expert, by their probability: a draw per exit group, equal on all ranks, since it
        decides whose weights they gather. All levels where there are no experts."""
        group = state.group(self.section.exit_groups)
        u = rng.uniform(state.seed, "flow/expert", state.step, group)
        drawn = flow.shift_sigma(u, self.section.sigma_shift)
        return next(levels for levels in pairwise((0.0, *boundaries, 1.0)) if drawn < levels[1] or levels[1] == 1)

    def _condition(self, batch: Batch, seed: int) -> Condition:
        u = rng.sample_uniform(seed, "flow/caption_dropout", batch.ids, device=batch.prompt_embeds.device)
        keep = (u >= self.section.caption_dropout)[:, None, None]
        return with_text(batch.condition, torch.where(keep, batch.prompt_embeds, batch.negative_embeds))
