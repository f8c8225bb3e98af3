"""For the objectives' tests: tiny networks in the roles' places, a batch, and the method written out naively."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgmd_dist import flow, rng
from sgmd_dist.batch import Batch
from sgmd_dist.objectives import dmd2, sgmd, sid, sim
from sgmd_dist.objectives._distillation import Distillation
from sgmd_dist.objectives.base import Losses, Phase, StepState
from sgmd_dist.rng import SampleId

SHAPE = (2, 3, 2, 2)  # C, F, H, W
STUDENT_SIGMAS = (1.0, 0.9375, 5 / 6, 0.625, 0.0)


class Network(nn.Module):
    """A small nonlinear velocity, in float64, that remembers how it was called."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.boundaries: tuple[float, ...] = ()
        self.levels: list[float] = []
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.float64, generator=draw))
        self.x: list[Tensor] = []
        self.sigma: list[Tensor] = []
        self.text: list[Tensor] = []
        self.graph: list[bool] = []

    def forward(self, x_sigma: Tensor, sigma: Tensor, prompt_embeds: Tensor, level: float) -> Tensor:
        self.x.append(x_sigma.detach().clone())
        self.levels.append(level)
        self.sigma.append(sigma)
        self.text.append(prompt_embeds)
        velocity = self.bare(x_sigma, sigma, prompt_embeds)
        self.graph.append(velocity.requires_grad)
        return velocity

    def bare(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """The same without remembering, for the naive re-statements."""
        w, prompt = self.weight, text.double().mean((1, 2)).reshape(-1, 1, 1, 1, 1)
        inner = w[0] * x + w[1] * x.roll(1, 2) + w[2] * flow.expand(sigma, x) + w[3] * prompt
        return torch.sin(inner) + 0.3 * x


class World:
    """The three roles, a batch and the state of one step."""

    def __init__(self) -> None:
        self.teacher, self.generator, self.fake = (Network(seed) for seed in (1, 2, 3))
        self.roles: Any = {"teacher": self.teacher, "generator": self.generator, "fake_score": self.fake}
        self.batch = make_batch(unit=0)
        self.state = StepState(step=0, seed=7, num_units=1)

    def counts(self) -> dict[str, int]:
        return {name: len(network.x) for name, network in self.roles.items()}

    def run(self, phase: Phase, batch: Batch | None = None) -> Losses:
        return phase.loss(self.roles, batch or self.batch, self.state)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: network.weight.grad for name, network in self.roles.items()}


def make_batch(unit: int, size: int = 2) -> Batch:
    ids = [SampleId(0, unit, i) for i in range(size)]
    prompts = rng.sample_normal((4, 3), 0, "prompts", ids, device="cpu")
    latents = rng.sample_normal(SHAPE, 0, "latents", ids, device="cpu")
    negative = rng.normal((1, 4, 3), 0, "negative")
    return Batch(ids, [str(i) for i in ids], SHAPE, prompts, negative, latents, torch.ones(size, dtype=torch.bool))


def make_sgmd(**keys: Any) -> sgmd.Sgmd:
    return sgmd.build(sgmd.Section.model_validate({"name": "sgmd", **keys}))


def make_dmd2(**keys: Any) -> dmd2.Dmd2:
    return dmd2.build(dmd2.Section.model_validate({"name": "dmd2", **keys}))


def make_sid(**keys: Any) -> sid.Sid:
    return sid.build(sid.Section.model_validate({"name": "sid", **keys}))


def make_sim(**keys: Any) -> sim.Sim:
    return sim.build(sim.Section.model_validate({"name": "sim", **keys}))


DIVERSE = {"diversity": {"weight": 0.05}}


def exits(objective: Distillation, groups: int, step: int, *, purpose: str = "rollout", update: int = 0) -> list[int]:
    """The exit index of every group of a step, one unit per group."""
    states = [StepState(step, 7, groups, unit) for unit in range(groups)]
    return [objective.exit_index(state, purpose, update) for state in states]


def spy_samples(
    objective: Distillation, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What reaches `generator_loss` as x_g, and `fake_loss` as velocity, noise and x_g."""
    generated: list[Tensor] = []
    inner: list[dict[str, Tensor]] = []
    generator_loss, fake_loss = objective.generator_loss, objective.fake_loss

    def see_generator(roles: Any, batch: Batch, state: StepState, x_g: Tensor) -> Losses:
        generated.append(x_g)
        return generator_loss(roles, batch, state, x_g)

    def see_fake(velocity: Tensor, noise: Tensor, x_g: Tensor, step: int) -> Tensor:
        inner.append({"velocity": velocity, "noise": noise, "x_g": x_g})
        return fake_loss(velocity, noise, x_g, step)

    monkeypatch.setattr(objective, "generator_loss", see_generator)
    monkeypatch.setattr(objective, "fake_loss", see_fake)
    return generated, inner


def naive_rollout(world: World, noise: Tensor, exit_index: int) -> Tensor:
    """Euler from the noise, without gradients up to the exit, written out."""
    x = noise
    text = world.batch.prompt_embeds
    for k in range(exit_index):
        with torch.no_grad():
            v = world.generator.bare(x, torch.full((2,), STUDENT_SIGMAS[k]), text)
            x = x + (STUDENT_SIGMAS[k + 1] - STUDENT_SIGMAS[k]) * v
    sigma = STUDENT_SIGMAS[exit_index]
    return x - sigma * world.generator.bare(x, torch.full((2,), sigma), text)


def naive_scores(
    world: World, x_g: Tensor, guidance: float, *, through_teacher: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """sigma, f_F with graph and f_T with or without, at the levels and noise that the step's keys give."""
    ids = world.batch.ids
    u = rng.sample_uniform(7, "generator/sigma", ids, 0, device="cpu")
    t = ((u * 1000).floor() + 1) / 1000
    sigma = (5 * t / (1 + 4 * t)).clamp(0.02, 0.98).float()
    noise = rng.sample_normal(SHAPE, 7, "generator/noise", ids, 0, device="cpu")
    s = sigma.reshape(-1, 1, 1, 1, 1)
    x_sigma = (1 - s) * x_g + s * noise
    fake = x_sigma - s * world.fake.bare(x_sigma, sigma, world.batch.prompt_embeds)
    with torch.set_grad_enabled(through_teacher):
        positive = world.teacher.bare(x_sigma, sigma, world.batch.prompt_embeds)
        negative = world.teacher.bare(x_sigma, sigma, world.batch.negative_embeds.expand(2, -1, -1))
        teacher = x_sigma - s * (negative + guidance * (positive - negative))
    return sigma, fake, teacher


def mean(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3, 4))


def naive_generator_loss(world: World, name: str, x_g: Tensor) -> Tensor:
    sigma, fake, teacher = naive_scores(world, x_g, guidance=3.0, through_teacher=name in ("sid", "sim"))
    n = mean((x_g - teacher).abs()).detach() + 1e-8
    if name == "sid":
        return (-0.2 * mean((teacher - fake) ** 2) + mean((teacher - fake) * (fake - x_g))) / n
    if name == "sim":
        delta = teacher - fake
        c = (0.3 * 24**0.5 / torch.sqrt(delta.square().sum((1, 2, 3, 4)) + 0.09 * 24)).reshape(-1, 1, 1, 1, 1)
        return mean(c * delta * (fake - x_g)) / n
    if name == "dmd2":
        g = ((fake - teacher) / n.reshape(-1, 1, 1, 1, 1)).detach()
        return 0.5 * mean((x_g - (x_g - g).detach()) ** 2)
    fisher = mean(0.5 * (fake - teacher) ** 2) / n
    nr = mean(0.5 * (fake - x_g.detach()) ** 2) / sigma
    return 0.7 * fisher - 0.1 * nr


def assert_generator_phase_is_written_out(world: World, objective: Distillation, name: str, step: int) -> None:
    """Loss, gradient and number of calls of the generator's phase, against the naive re-statements."""
    world.state.step = step
    exit_index = objective.exit_index(world.state, "rollout")
    losses = world.run(objective.phases(step)[0])
    x_g = naive_rollout(world, rng.sample_normal(SHAPE, 7, "rollout", world.batch.ids, device="cpu"), exit_index)
    naive = naive_generator_loss(world, name, x_g)
    torch.testing.assert_close(losses.per_sample, naive, atol=0, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(loss.mean(), world.generator.weight)[0] for loss in (losses.per_sample, naive))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    assert world.counts() == {"teacher": 1, "generator": exit_index + 1, "fake_score": 1}
    assert world.generator.graph == [False] * exit_index + [True], "a gradient at the exit step alone"
