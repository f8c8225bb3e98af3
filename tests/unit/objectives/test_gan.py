"""DMD2's GAN term: its losses against closed forms, its phases against the method written out, what it costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from distillation_world import SHAPE, Network, World, make_dmd2, mean, naive_generator_loss, naive_rollout
from torch import Tensor, nn

from sgmd_dist import flow, rng
from sgmd_dist.errors import UserError
from sgmd_dist.objectives import dmd2
from sgmd_dist.objectives._distillation import Distillation

GAN = {"weight": 0.3, "fake_weight": 0.5, "r1_weight": 0.2, "r1_std": 0.05}
RAMP = {"schedule": "piecewise", "points": [[0, 0.0], [10, 0.3]]}  # the head learns for ten steps by itself


# -- losses -----------------------------------------------------------------------------------------------------


def test_the_logistic_losses_are_those_of_probabilities() -> None:
    real, generated = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    d_real, d_generated = torch.sigmoid(real), torch.sigmoid(generated)
    torch.testing.assert_close(dmd2.gan_generator_loss(generated), -torch.log(d_generated))
    loss = dmd2.gan_head_loss(real, generated)
    torch.testing.assert_close(loss, -torch.log(d_real) - torch.log(1 - d_generated))
    gradients = torch.autograd.grad(loss.sum(), [real, generated])
    torch.testing.assert_close(gradients, (d_real - 1, d_generated))


def test_the_logistic_losses_stay_finite_where_probabilities_saturate() -> None:
    far = torch.tensor([-500.0, 500.0])
    assert dmd2.gan_generator_loss(far).tolist() == [500.0, 0.0]
    assert dmd2.gan_head_loss(far, far).tolist() == [500.0, 500.0]


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def exact_r1(network: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    return (gradient**2).sum(1)


def expected_r1(network: nn.Module, x: Tensor, std: float) -> Tensor:
    """The mean of the approximation over its noise, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    weights = weights / weights.sum()
    total = torch.zeros(len(x), dtype=torch.float64)
    for place in product(range(len(nodes)), repeat=3):
        noise = torch.tensor([nodes[i] for i in place], dtype=torch.float64)
        share = float(np.prod([weights[i] for i in place]))
        r1 = dmd2.approximate_r1(network(x)[:, 0], network(x + std * noise)[:, 0], std)
        total = total + share * r1
    return total


def test_the_finite_difference_is_the_gradient_penalty_for_small_noise() -> None:
    """Its bias falls with the noise's variance, for the value and for the gradient that trains the head."""
    network, x = small_network(), torch.randn(4, 3, dtype=torch.float64)
    exact = exact_r1(network, x)
    trains = list(network.parameters())[:-1]  # a bias behind everything takes no part
    exact_gradients = torch.autograd.grad(exact.sum(), trains)
    biases = []
    for std in (0.2, 0.1, 0.05):
        ours = expected_r1(network, x, std)
        gradients = torch.autograd.grad(ours.sum(), trains)
        off = [ours - exact, *(a - b for a, b in zip(gradients, exact_gradients, strict=True))]
        biases.append([float(error.detach().abs().max()) for error in off])
    for coarse, fine in pairwise(biases):
        assert all(c / f == pytest.approx(4, rel=0.2) for c, f in zip(coarse, fine, strict=True))
    assert biases[-1][0] < 0.01 * float(exact.detach().max())


# -- phases -----------------------------------------------------------------------------------------------------


class Judge(Network):
    """A fake score whose features, before the velocity, a linear head reads."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.head = nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
        self.judged: list[Tensor] = []

    def logit(self, x: Tensor, *, detached: bool = False) -> Tensor:
        features = torch.stack([mean(torch.tanh(self.weight[0] * x)), mean(x * self.weight[1] * x)], 1)
        return (features.detach() if detached else features) @ self.head

    def judge(
        self, x_sigma: Tensor, sigma: Tensor, prompt_embeds: Tensor, level: float, *, detached: bool = False
    ) -> tuple[Tensor, Tensor]:
        self.judged.append(x_sigma)
        return self(x_sigma, sigma, prompt_embeds, level), self.logit(x_sigma, detached=detached)


@pytest.fixture
def world() -> World:
    world = World()
    world.fake = world.roles["fake_score"] = Judge(3)
    return world


def make_gan(**keys: Any) -> dmd2.Dmd2:
    return make_dmd2(fake_updates=1, gan={**GAN, **keys})


def rollout(world: World, objective: Distillation) -> Tensor:
    noise = rng.sample_normal(SHAPE, 7, "rollout", world.batch.ids, device="cpu")
    return naive_rollout(world, noise, objective.exit_index(world.state, "rollout"))


def draw(world: World, purpose: str) -> Tensor:
    return rng.sample_normal(SHAPE, 7, purpose, world.batch.ids, 0, device="cpu")


def test_generator_phase_is_dmd_and_the_judged_sample(world: World) -> None:
    objective = make_gan()
    losses = world.run(objective.phases(0)[0])
    x_g = rollout(world, objective)
    s = flow.expand(world.fake.sigma[0], x_g)
    judged = world.fake.logit((1 - s) * x_g + s * draw(world, "generator/noise"))
    naive = naive_generator_loss(world, "dmd2", x_g) - 0.3 * torch.log(torch.sigmoid(judged))
    torch.testing.assert_close(losses.per_sample, naive, atol=0, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(loss.mean(), world.generator.weight)[0] for loss in (losses.per_sample, naive))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    assert world.counts()["fake_score"] == 1, "one pass gives the score and the logit"


def test_generator_phase_trains_neither_the_fake_nor_the_head(world: World) -> None:
    world.fake.requires_grad_(False)
    world.run(make_gan().phases(0)[0]).per_sample.mean().backward()
    gradients = world.gradients()
    assert gradients["teacher"] is None and gradients["fake_score"] is None and world.fake.head.grad is None
    assert gradients["generator"] is not None and gradients["generator"].abs().min() > 0


@pytest.mark.parametrize("trains_blocks", [True, False])
@pytest.mark.parametrize("r1_weight", [0.0, 0.2])
def test_fake_phase_is_denoising_and_real_against_generated(
    world: World, r1_weight: float, trains_blocks: bool
) -> None:
    objective = make_gan(r1_weight=r1_weight, trains_blocks=trains_blocks)
    losses = world.run(objective.phases(0)[1])
    size, fake = world.batch.size, world.fake
    [x], sigma = fake.judged, fake.sigma[0]
    assert len(x) == size * (3 if r1_weight else 2), "all in one pass"
    assert torch.equal(sigma, sigma[:size].repeat(len(x) // size)), "real and generated at the same levels"
    s = flow.expand(sigma[:size], x)
    latents = world.batch.latents
    assert latents is not None
    real = (1 - s) * latents + s * draw(world, "real/noise")
    torch.testing.assert_close(x[size : 2 * size], real.to(x.dtype), atol=1e-6, rtol=0)
    generated, noise = x[:size].detach(), draw(world, "fake/noise")
    x_g = (generated - s * noise) / (1 - s)
    velocity = fake.bare(generated, sigma[:size], world.batch.prompt_embeds)
    at = {"detached": not trains_blocks}
    d_generated, d_real = torch.sigmoid(fake.logit(generated, **at)), torch.sigmoid(fake.logit(real, **at))
    head = -torch.log(1 - d_generated) - torch.log(d_real)
    if r1_weight:
        near = fake.logit(real + 0.05 * draw(world, "real/r1"), **at)
        head = head + 0.2 * (fake.logit(real, **at) - near) ** 2 / 0.05**2
    naive = mean((velocity - (noise - x_g)) ** 2) + 0.5 * head
    torch.testing.assert_close(losses.per_sample, naive, atol=0, rtol=1e-4)
    weights = [fake.weight, fake.head]
    ours, theirs = (torch.autograd.grad(loss.mean(), weights) for loss in (losses.per_sample, naive))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert world.generator.weight.grad is None


def test_a_head_alone_leaves_the_blocks_to_the_denoising(world: World) -> None:
    gradients = []
    for gan in ({}, {**GAN, "trains_blocks": False}):
        losses = world.run(make_dmd2(fake_updates=1, gan=gan).phases(0)[1])
        gradients.append(torch.autograd.grad(losses.per_sample.mean(), world.fake.weight)[0])
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_metrics_are_per_sample_without_graphs(world: World) -> None:
    metrics = {k: v for phase in make_gan().phases(0) for k, v in world.run(phase).metrics.items()}
    judged = {"generator/gan", "fake_score/gan", "fake_score/logit_real", "fake_score/logit_generated", "fake_score/r1"}
    assert judged < set(metrics)
    assert all(m.shape == (world.batch.size,) and not m.requires_grad for m in metrics.values())


# -- what it costs ----------------------------------------------------------------------------------------------


def declared(objective: Distillation, step: int) -> list[tuple[str, int]]:
    """Gradient and batch of the fake score's passes, phase by phase."""
    passes = [p for phase in objective.phases(step) for p in phase.passes if p.role == "fake_score"]
    return [(p.gradient, p.batch) for p in passes]


@pytest.mark.parametrize(
    "gan, expected",
    [
        ({}, [("none", 1), ("weights", 1)]),
        ({"fake_weight": 1.0, "r1_weight": 1.0}, [("none", 1), ("weights", 1)]),
        ({"weight": 0.1}, [("input", 1), ("weights", 2)]),
        ({"weight": 0.1, "r1_weight": 1.0}, [("input", 1), ("weights", 3)]),
        ({"weight": 0.1, "fake_weight": 0.0}, [("input", 1), ("weights", 1)]),
        ({"weight": RAMP}, [("none", 1), ("weights", 2)]),
    ],
)
def test_declared_passes_are_those_that_run(world: World, gan: dict[str, Any], expected: list[tuple[str, int]]) -> None:
    objective = make_dmd2(fake_updates=1, gan=gan)
    assert declared(objective, 0) == expected
    for phase in objective.phases(0):
        world.run(phase)
    assert [len(x) // world.batch.size for x in world.fake.x] == [batch for _, batch in expected]


def test_a_head_may_learn_before_the_generator_sees_it(world: World) -> None:
    objective = make_gan(weight=RAMP)
    assert objective.needs_latents == "objective.gan.weight > 0"
    assert "generator/gan" not in world.run(objective.phases(9)[0]).metrics
    assert "fake_score/gan" in world.run(objective.phases(9)[1]).metrics
    world.state.step = 10
    assert "generator/gan" in world.run(objective.phases(10)[0]).metrics


def test_without_weight_nothing_is_judged_and_no_latents_are_needed(world: World) -> None:
    off, plain = make_dmd2(fake_updates=1, gan={"fake_weight": 9.0}), make_dmd2(fake_updates=1)
    captions_only = replace(world.batch, latents=None)
    results = [
        [world.run(phase, captions_only).per_sample for phase in objective.phases(0)] for objective in (off, plain)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not world.fake.judged and off.needs_latents is None and off.section.head_of("fake_score") is None


def test_a_head_belongs_to_the_fake_score_alone() -> None:
    section = make_gan().section
    assert section.head_of("fake_score") is section.gan
    assert section.head_of("generator") is None and section.head_of("teacher") is None


def test_captions_only_are_refused(world: World) -> None:
    with pytest.raises(UserError, match=r"objective\.gan\.weight > 0 needs latents"):
        world.run(make_gan().phases(0)[1], replace(world.batch, latents=None))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"blocks": [3, 1]}, "ascending"),
        ({"blocks": []}, "at least 1 item"),
        ({"r1_std": 0.0}, "greater than 0"),
        ({"weight": -0.1}, "expected a number >= 0"),
    ],
)
def test_wrong_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_gan(**keys)
