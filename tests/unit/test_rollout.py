"""Few-step rollouts: backward simulation, guidance, sampling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.rollout import backward_simulation, guided, sample

SIGMAS = flow.sampling_sigmas(4, 5.0)
SHAPE = (2, 3, 2, 2, 2)


class Generator:
    """velocity = w sin(x) + sigma, with a record of the calls."""

    def __init__(self) -> None:
        self.weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        self.sigmas: list[float] = []
        self.with_graph: list[bool] = []

    def __call__(self, x: Tensor, sigma: Tensor, level: float) -> Tensor:
        assert sigma.shape == (len(x),) and (sigma == level).all()
        self.sigmas.append(sigma[0].item())
        velocity = self.bare(x, sigma[0].item())
        self.with_graph.append(velocity.requires_grad)
        return velocity

    def bare(self, x: Tensor, sigma: float) -> Tensor:
        return self.weight * torch.sin(x) + sigma


def normal(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weight_gradient(x_g: Tensor, generator: Generator) -> Tensor:
    return torch.autograd.grad(x_g.square().sum(), generator.weight)[0]


def naive(generator: Generator, noise: Tensor, exit_index: int, *, renoise: bool) -> Tensor:
    x = noise
    for k in range(exit_index):
        v = generator.bare(x, SIGMAS[k]).detach()
        if renoise:
            x = (1 - SIGMAS[k + 1]) * (x - SIGMAS[k] * v) + SIGMAS[k + 1] * normal(100 + k)
        else:
            x = x + (SIGMAS[k + 1] - SIGMAS[k]) * v
    return x - SIGMAS[exit_index] * generator.bare(x, SIGMAS[exit_index])


@pytest.mark.parametrize("exit_index", range(4))
@pytest.mark.parametrize("renoise", [False, True])
def test_rollout_is_the_naive_loop(exit_index: int, renoise: bool) -> None:
    generator, noise = Generator(), normal()
    fresh = (lambda k: normal(100 + k)) if renoise else None
    x_g = backward_simulation(generator, noise, SIGMAS, exit_index, renoise=fresh)
    expected = naive(generator, noise, exit_index, renoise=renoise)
    torch.testing.assert_close(x_g, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weight_gradient(x_g, generator), weight_gradient(expected, generator), atol=0, rtol=1e-6)


@pytest.mark.parametrize("exit_index", range(4))
def test_rollout_runs_one_forward_per_step_and_keeps_the_graph_of_the_last(exit_index: int) -> None:
    generator = Generator()
    backward_simulation(generator, normal(), SIGMAS, exit_index)
    assert generator.sigmas == pytest.approx(SIGMAS[: exit_index + 1], abs=1e-7)
    assert generator.with_graph == [False] * exit_index + [True]


def test_rollout_obeys_the_callers_gradient_mode() -> None:
    generator = Generator()
    with torch.no_grad():
        assert not backward_simulation(generator, normal(), SIGMAS, 2).requires_grad
    assert generator.with_graph == [False] * 3


def test_renoising_asks_for_one_noise_per_step_between() -> None:
    asked: list[int] = []

    def fresh(k: int) -> Tensor:
        asked.append(k)
        return normal(k)

    backward_simulation(Generator(), normal(), SIGMAS, 3, renoise=fresh)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("exit_index", range(3))
def test_a_known_first_velocity_saves_a_forward_and_changes_nothing(exit_index: int) -> None:
    generator, plain = Generator(), Generator()
    first = generator.bare(normal(), 1.0)
    x_g = backward_simulation(generator, normal(), SIGMAS, exit_index, first_velocity=first)
    expected = backward_simulation(plain, normal(), SIGMAS, exit_index)
    assert len(generator.sigmas) == exit_index == len(plain.sigmas) - 1
    torch.testing.assert_close(x_g, expected, atol=0, rtol=1e-12)
    torch.testing.assert_close(weight_gradient(x_g, generator), weight_gradient(expected, plain), atol=0, rtol=1e-12)


def test_the_last_exit_is_what_sampling_gives() -> None:
    """Exit K - 1 predicts x0 where the sampler takes its last Euler step, to sigma 0."""
    generator = Generator()
    sampled = sample(generator, normal(), 4, 5.0)
    assert not sampled.requires_grad and len(generator.sigmas) == 4
    torch.testing.assert_close(sampled, backward_simulation(generator, normal(), SIGMAS, 3).detach(), atol=1e-6, rtol=0)


# -- guidance ---------------------------------------------------------------------------------------------------

PROMPT = torch.arange(2 * 4 * 3, dtype=torch.float64).reshape(2, 4, 3)
NEGATIVE = -torch.ones(1, 4, 3, dtype=torch.float64)
LEVEL = 0.1


class Conditional:
    """velocity = sin(x) + sigma mean(text), with a record of the batches."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, text: Tensor, level: float) -> Tensor:
        assert len(x) == len(sigma) == len(text) and level == LEVEL
        self.batch_sizes.append(len(x))
        return torch.sin(x) + flow.expand(sigma * text.mean((1, 2)), x)


@pytest.mark.parametrize("mode, batch_sizes", [("batched", [4]), ("separate", [2, 2])])
def test_guidance_is_the_same_in_one_forward_or_two(mode, batch_sizes: list[int]) -> None:
    network, sigma = Conditional(), torch.tensor([0.3, 0.9], dtype=torch.float64)
    velocity = guided(network, PROMPT, NEGATIVE, 3.0, mode)(normal(), sigma, LEVEL)
    assert network.batch_sizes == batch_sizes
    means = PROMPT.mean((1, 2))
    expected = torch.sin(normal()) + flow.expand(sigma * (-1 + 3 * (means + 1)), normal())
    torch.testing.assert_close(velocity, expected)


@pytest.mark.parametrize("mode", ["batched", "separate"])
def test_no_guidance_is_one_forward_on_the_prompt(mode) -> None:
    network, sigma = Conditional(), torch.tensor([0.3, 0.9], dtype=torch.float64)
    velocity = guided(network, PROMPT, NEGATIVE, 1.0, mode)(normal(), sigma, LEVEL)
    assert network.batch_sizes == [2]
    torch.testing.assert_close(velocity, torch.sin(normal()) + flow.expand(sigma * PROMPT.mean((1, 2)), normal()))
