"""The mixture's velocity against automatic differentiation and sampling, and the networks that start from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.benchmarks.science.exact import ExactNetwork, Mixture, MixtureWorld
from sgmd_dist.objectives import dmd2, sgmd
from sgmd_dist.objectives.base import StepState
from sgmd_dist.recipe import OptimSection
from sgmd_dist.roles import Roles, build_roles

DIM, NUM_COMPONENTS, NUM_PROMPTS = 3, 4, 2
SIGMAS = (0.0, 1e-4, 0.02, 0.3, 0.9, 1.0)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    draw = torch.Generator().manual_seed(0)
    means = torch.randn(NUM_COMPONENTS, DIM, generator=draw, dtype=torch.float64)
    root = torch.randn(DIM, 1, generator=draw, dtype=torch.float64)
    weights = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.2, 0.3, 0.5]])
    return Mixture(means, 0.3 * root @ root.T + 0.05 * torch.eye(DIM, dtype=torch.float64), weights)


@pytest.fixture
def world(mixture: Mixture) -> MixtureWorld:
    return MixtureWorld(
        "test", (DIM, 1, 1, 1), mixture, batch_size=6, guidance_scale=2.0, sigma_shift=5.0, num_samples=64
    )


def prompted(mixture: Mixture, prompt: int | None, count: int) -> Tensor:
    if prompt is None:
        return torch.zeros(count, 1, NUM_PROMPTS)
    return mixture.prompt_embeds(torch.full((count,), prompt))


def log_density(mixture: Mixture, x: Tensor, sigma: float, prompt: int | None) -> Tensor:
    """log p_sigma `[B]` in float64 by the definition: a sum of torch's own normal densities."""
    weights = mixture.weights.double().mean(0) if prompt is None else mixture.weights[prompt].double()
    covariance = (1 - sigma) ** 2 * mixture.covariance.double() + sigma**2 * torch.eye(DIM, dtype=torch.float64)
    normals = torch.distributions.MultivariateNormal((1 - sigma) * mixture.means.double(), covariance)
    return (normals.log_prob(x[:, None]) + weights.log()).logsumexp(1)


def at(mixture: Mixture, sigma: float, count: int = 64) -> Tensor:
    """Points where the marginal has its mass."""
    draw = torch.Generator().manual_seed(1)
    x0 = mixture.means[torch.randint(NUM_COMPONENTS, (count,), generator=draw)]
    noise = torch.randn(count, DIM, generator=draw)
    return (1 - sigma) * x0 + max(sigma, 0.3) * noise


# -- the velocity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [None, 0, 1])
@pytest.mark.parametrize("sigma", SIGMAS[1:-1])
def test_velocity_is_tweedies(mixture: Mixture, sigma: float, prompt: int | None) -> None:
    """E[x0 | x] = (x + sigma² grad log p_sigma(x)) / (1 - sigma)."""
    x = at(mixture, sigma)
    exact_x = x.double().requires_grad_()
    (score,) = torch.autograd.grad(log_density(mixture, exact_x, sigma, prompt).sum(), exact_x)
    x0 = (exact_x + sigma**2 * score) / (1 - sigma)
    level = torch.full((len(x),), sigma)
    velocity = mixture.velocity(x, level, prompted(mixture, prompt, len(x)))
    assert velocity.dtype == torch.float32
    expected = -score if sigma > 0.999 else -(exact_x + sigma * score) / (1 - sigma)
    torch.testing.assert_close(velocity.double(), expected.detach(), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(
        mixture.posterior_mean(x, level, prompted(mixture, prompt, len(x))).double(), x0.detach(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("prompt", [None, 0, 1])
def test_velocity_at_both_ends(mixture: Mixture, prompt: int | None) -> None:
    x = at(mixture, 0.5)
    embeds = prompted(mixture, prompt, len(x))
    weights = mixture.weights.mean(0) if prompt is None else mixture.weights[prompt]
    torch.testing.assert_close(mixture.velocity(x, torch.zeros(len(x)), embeds), -x)
    torch.testing.assert_close(mixture.velocity(x, torch.ones(len(x)), embeds), x - weights @ mixture.means)


def test_posterior_mean_is_that_of_samples(mixture: Mixture) -> None:
    """Importance sampling: x0 drawn from the mixture, weighted with the likelihood of x_sigma."""
    count, sigma = 400_000, 0.5
    draw = torch.Generator().manual_seed(2)
    prompts = torch.ones(count, dtype=torch.long)
    x0 = mixture.draw(prompts, torch.rand(count, generator=draw), torch.randn(count, DIM, generator=draw))
    x_sigma = torch.tensor([[0.3, -0.2, 0.1], [-0.5, 0.4, 0.6]])
    likelihood = -(x_sigma[:, None] - (1 - sigma) * x0).square().sum(2) / (2 * sigma**2)
    expected = likelihood.softmax(1) @ x0
    found = mixture.posterior_mean(x_sigma, torch.full((2,), sigma), prompted(mixture, 1, 2))
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_gradients_through_the_input_are_finite(mixture: Mixture, sigma: float) -> None:
    x = at(mixture, sigma).requires_grad_()
    mixture.velocity(x, torch.full((len(x),), sigma), prompted(mixture, 0, len(x))).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_draws_have_the_prompts_components(mixture: Mixture) -> None:
    count = 100_000
    draw = torch.Generator().manual_seed(3)
    for prompt, weights in enumerate(mixture.weights):
        prompts = torch.full((count,), prompt)
        x = mixture.draw(prompts, torch.rand(count, generator=draw), torch.randn(count, DIM, generator=draw))
        mean = weights @ mixture.means
        spread = mixture.covariance + torch.cov(mixture.means.T, aweights=weights.double(), correction=0).float()
        torch.testing.assert_close(x.mean(0), mean, atol=0.02, rtol=0)
        torch.testing.assert_close(torch.cov(x.T), spread, atol=0.03, rtol=0)


def test_draws_at_the_edges_of_u_exclude_what_the_prompt_excludes(mixture: Mixture) -> None:
    prompts, no_noise = torch.tensor([0, 0, 1, 1]), torch.zeros(4, DIM)
    x = mixture.draw(prompts, torch.tensor([0.0, 1 - 1e-16, 0.0, 1.0], dtype=torch.float64), no_noise)
    assert torch.equal(x, mixture.means[[0, 1, 1, 3]])


# -- the networks -----------------------------------------------------------------------------------------------


def roles_of(world: MixtureWorld) -> Roles:
    optim = OptimSection.model_validate({"generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}})
    roles = build_roles(world.networks(), {"generator", "fake_score"}, optim, 10, recomputes=False)
    roles.warm_up(torch.device("cpu"))
    return roles


def test_all_networks_start_as_the_teacher_without_guidance(world: MixtureWorld) -> None:
    batch, roles = world.batch(0), roles_of(world)
    assert batch.latents is not None
    sigma = torch.linspace(0, 1, batch.size)
    velocities = [roles[name].run(batch.latents, sigma, batch.prompt_embeds) for name in roles]
    exact = world.mixture.velocity(batch.latents.flatten(1), sigma, batch.prompt_embeds)
    for velocity in velocities:
        assert torch.equal(velocity, exact.reshape(batch.latents.shape))
    assert roles["teacher"].parameters == {}


def test_networks_are_new_and_equal_each_time(world: MixtureWorld) -> None:
    first, second = (world.networks()["generator"][0].state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    weights = [v for n, v in first.items() if n.startswith("correction") and n.endswith("weight")]
    assert weights[-1].abs().max() == 0
    for weight in weights[:-1]:
        assert weight.std().item() == pytest.approx(1 / math.sqrt(weight.shape[1]), rel=0.1)


def test_the_correction_depends_on_everything(mixture: Mixture) -> None:
    network = ExactNetwork(mixture)
    torch.nn.init.normal_(network.correction[-1].weight)  # pyright: ignore[reportArgumentType]
    x, sigma, embeds = torch.randn(1, DIM, 1, 1, 1), torch.tensor([0.5]), prompted(mixture, 0, 1)

    def correction(x: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        return network(x, sigma, embeds).flatten(1) - mixture.velocity(x.flatten(1), sigma, embeds)

    base = correction(x, sigma, embeds)
    for changed in ((x + 0.1, sigma, embeds), (x, sigma + 0.1, embeds), (x, sigma, prompted(mixture, 1, 1))):
        assert (correction(*changed) - base).abs().max() > 1e-3


@pytest.mark.parametrize("objective", [sgmd, dmd2])
def test_an_objectives_step_trains_both_networks(world: MixtureWorld, objective) -> None:
    roles, state = roles_of(world), StepState(0, seed=0, num_units=1)
    before = {name: [p.detach().clone() for p in roles[name].parameters.values()] for name in roles}
    for unit, phase in enumerate(objective.build(objective.Section(fake_updates=1, guidance_scale=2.0)).phases(0)):
        roles.train_only(phase.role)
        phase.loss(roles, world.batch(unit), state).per_sample.mean().backward()
        assert roles.step(phase.role, 0) > 0
    for name in ("generator", "fake_score"):
        moved = [not torch.equal(a, b) for a, b in zip(before[name], roles[name].parameters.values(), strict=True)]
        assert moved[-1], "the last layer moves first"


# -- the world --------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_the_unit(world: MixtureWorld) -> None:
    first, again, other = world.batch(3), world.batch(3), world.batch(4)
    assert first.latents is not None and again.latents is not None and other.latents is not None
    assert torch.equal(first.latents, again.latents) and not torch.equal(first.latents, other.latents)
    assert first.latents.shape == (6, DIM, 1, 1, 1) and first.valid.all()
    assert [i.unit for i in first.ids] == [3] * 6 and [i.index for i in first.ids] == [*range(6)]
    assert first.prompt_embeds.argmax(2)[:, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert first.negative_embeds.abs().max() == 0


def test_teacher_samples_are_kept_and_follow_the_guided_velocity(world: MixtureWorld) -> None:
    samples = world.teacher_samples(32, seed=1)
    assert samples is world.teacher_samples(32, seed=1)
    assert samples.shape == (32, DIM, 1, 1, 1)
    assert not torch.equal(samples, world.teacher_samples(32, seed=2))
    embeds, negative = world.prompts(32)
    x, level = samples.flatten(1), torch.full((32,), 0.05)
    conditional, unconditional = (
        world.mixture.velocity(x, level, each) for each in (embeds, negative.expand(32, 1, NUM_PROMPTS))
    )
    assert not torch.allclose(conditional, flow.guide(conditional, unconditional, 2.0))
    for group, weights in zip(world.by_prompt(samples.flatten(1)), world.mixture.weights, strict=True):
        distances = torch.cdist(group, world.mixture.means[weights > 0]).min(1).values
        assert distances.median() < 1.0


def test_scores_of_the_teacher_are_the_best(world: MixtureWorld) -> None:
    reference = world.teacher_samples(512, seed=0)
    own, swapped = world.teacher_samples(512, seed=1), reference.roll(1, 0)
    good, confused = world.score(own, reference), world.score(swapped, reference)
    assert good["mode_coverage"] == 1 and good["precision"] > 0.9
    assert good["swd"] < 0.3 * confused["swd"], "samples for another prompt are wrong ones"
    assert good["energy_distance"] < 0.1 * confused["energy_distance"]
    assert world.score(reference, reference)["swd"] == pytest.approx(0, abs=1e-12)
