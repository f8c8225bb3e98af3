"""The method's statements in closed form: everything Gaussian, float64, no Monte Carlo. See `gaussian_world`."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from gaussian_world import GENERATOR, SIGMAS, Draws, Gaussian, draws, f64, grad, hermite, random_gaussian
from torch import Tensor

from sgmd_dist import flow, rng
from sgmd_dist.objectives import dmd2, sgmd
from sgmd_dist.objectives._distillation import fake_score_loss, teacher_distance

NR_WEIGHT = 0.1


# -- the ideal fake score ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", SIGMAS)
def test_jacobian_of_the_ideal_fake_is_the_posterior_covariance(sigma: float) -> None:
    a, d = 1 - sigma, 3
    precision = torch.linalg.inv(GENERATOR.covariance) + (a / sigma) ** 2 * torch.eye(d, dtype=torch.float64)
    posterior_covariance = torch.linalg.inv(precision)
    a_jacobian = a * GENERATOR.jacobian(sigma)
    torch.testing.assert_close(a_jacobian, (a / sigma) ** 2 * posterior_covariance, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(a_jacobian, a_jacobian.T, atol=1e-11, rtol=0)
    assert torch.linalg.eigvalsh((a_jacobian + a_jacobian.T) / 2).min() > 0


def test_velocity_of_the_ideal_fake_gives_its_x0_prediction() -> None:
    """E[eps - x_g | x_sigma] conditioned directly, against f_F, through flow.x0_from_velocity."""
    sigma, a = 0.4, 0.6
    x_sigma = f64(0.3, -1.2, 2.0)[None]
    variance = a**2 * GENERATOR.covariance + sigma**2 * torch.eye(3, dtype=torch.float64)
    gain = (sigma * torch.eye(3, dtype=torch.float64) - a * GENERATOR.covariance) @ torch.linalg.inv(variance)
    velocity = -GENERATOR.mean + (x_sigma - a * GENERATOR.mean) @ gain.T
    predicted = flow.x0_from_velocity(x_sigma, velocity, f64(sigma))
    torch.testing.assert_close(predicted, GENERATOR.x0(x_sigma, f64(sigma)), atol=1e-12, rtol=0)


# -- SGMD's gradient --------------------------------------------------------------------------------------------


def sgmd_gradient(at: Draws, nr_weight: float) -> Tensor:
    loss = sgmd.fisher_loss(at.f_fake, at.f_teacher, at.n) - nr_weight * sgmd.nr_loss(at.f_fake, at.x_g, at.sigma)
    return grad(loss, at.x_g)


@pytest.mark.parametrize("nr_weight", [0.0, NR_WEIGHT, 0.5])
def test_sgmd_gradient_is_the_closed_form(nr_weight: float) -> None:
    at = draws()
    residual = (at.f_fake - at.x_g) / at.sigma[:, None]
    cotangent = (at.f_fake - at.f_teacher) / (at.n[:, None] + 1e-8) - nr_weight * residual
    torch.testing.assert_close(sgmd_gradient(at, nr_weight), at.times_a_jacobian(cotangent), atol=1e-10, rtol=1e-9)


def test_sgmd_gradient_is_the_alpha_form() -> None:
    """NR replaces the share alpha = lambda n / sigma of the fake's prediction by x_g."""
    at = draws()
    alpha = sgmd.alpha(at.n, at.sigma, NR_WEIGHT, 1.0)[:, None]
    torch.testing.assert_close(alpha[:, 0], NR_WEIGHT * at.n / at.sigma)
    cotangent = ((1 - alpha) * at.f_fake + alpha * at.x_g - at.f_teacher) / at.n[:, None]
    torch.testing.assert_close(sgmd_gradient(at, NR_WEIGHT), at.times_a_jacobian(cotangent), atol=2e-7, rtol=1e-6)


def test_each_sample_has_its_own_normalizer() -> None:
    """The gradient of a sample does not depend on what else is in the batch."""
    at = draws()
    assert at.n.max() > 3 * at.n.min()
    alone = []
    for one in (slice(i, i + 1) for i in range(len(SIGMAS))):
        n = teacher_distance(at.x_g[one], at.f_teacher[one])
        alone.append(sgmd.fisher_loss(at.f_fake[one], at.f_teacher[one], n))
    torch.testing.assert_close(grad(torch.cat(alone), at.x_g), sgmd_gradient(at, 0.0), atol=0, rtol=1e-12)


def test_sgmd_is_dmd_preconditioned_by_the_posterior_covariance() -> None:
    at = draws()
    direction = grad(dmd2.dmd_loss(at.x_g, dmd2.dmd_gradient(at.f_fake, at.f_teacher, at.n).detach()), at.x_g)
    torch.testing.assert_close(sgmd_gradient(at, 0.0), at.times_a_jacobian(direction * 3), atol=1e-9, rtol=1e-6)


def test_a_direction_that_the_generator_has_lost_gets_no_gradient() -> None:
    """Zero variance along an axis: the preconditioner filters it out, DMD2's direction does not."""
    lost = Gaussian(GENERATOR.mean, torch.diag(f64(1.0, 1.0, 0.0)))
    at = draws(fake=lost)
    direction = dmd2.dmd_gradient(at.f_fake, at.f_teacher, at.n)
    assert (direction[:, 2].abs() > 1e-2).all()
    assert sgmd_gradient(at, NR_WEIGHT)[:, 2].abs().max() < 1e-12


# -- the residual of NR -----------------------------------------------------------------------------------------


def test_nr_residual_has_zero_mean_given_x_sigma() -> None:
    """Bayes' rule by quadrature on a fine grid (exact to rounding for Gaussians), without using the posterior."""
    prior = Gaussian(f64(0.7), f64(1.3)[:, None])
    x_g = torch.linspace(-14, 15, 20001, dtype=torch.float64)[:, None]
    for sigma, x_sigma in product((0.1, 0.625, 0.98), (-2.0, 0.5, 3.0)):
        likelihood = -((x_sigma - (1 - sigma) * x_g) ** 2) / (2 * sigma**2) - (x_g - 0.7) ** 2 / (2 * 1.3)
        weight = likelihood[:, 0].softmax(0)
        for lag in (0.0, 0.25):
            f_fake = (prior.x0(f64(x_sigma)[:, None], f64(sigma)) + lag).expand_as(x_g).clone().requires_grad_()
            residual = grad(sgmd.nr_loss(f_fake, x_g, torch.full((len(x_g),), sigma, dtype=torch.float64)), f_fake)
            spread = (weight * residual[:, 0].abs()).sum()
            mean = (weight * residual[:, 0]).sum()
            assert mean.item() == pytest.approx(lag / sigma, abs=1e-9), "a lagging fake is what NR sees on average"
            assert spread > 0.2


def test_nr_gradient_averages_to_nothing_but_is_correlated_with_the_sample() -> None:
    """E[a Jᵀ r] = E[a Jᵀ r x_sigmaᵀ] = 0, yet E[a Jᵀ r x_gᵀ] is negative: -NR contracts scale-like parameters."""
    sigma, world = 0.625, random_gaussian(3, d=2)
    nodes, weights = hermite(4, dims=4)
    x_g = (world.mean + nodes[:, :2] @ torch.linalg.cholesky(world.covariance).T).requires_grad_()
    levels = torch.full((len(nodes),), sigma, dtype=torch.float64)
    x_sigma = flow.add_noise(x_g, nodes[:, 2:], levels)
    gradient = grad(sgmd.nr_loss(world.x0(x_sigma, levels), x_g, levels), x_g)
    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(weights @ gradient, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    with_x_sigma = (weights[:, None] * gradient).T @ x_sigma
    torch.testing.assert_close(with_x_sigma, torch.zeros(2, 2, dtype=torch.float64), atol=1e-12, rtol=0)
    with_x_g = ((weights[:, None] * gradient).T @ (x_g - world.mean)).detach()
    assert torch.linalg.eigvalsh((with_x_g + with_x_g.T) / 2).max() < -1e-3


# -- fixed points: x_g = s z, teacher N(0, 1), fake ideal at every s ----------------------------------------------


def renoise_levels() -> Tensor:
    """Every noise level that a recipe's defaults can draw, once."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    return flow.renoise_sigma(u, 5.0, 0.02, 0.98)


def wide_distance(s: float, sigma: Tensor) -> Tensor:
    """E|x_g - f_T|: what the normalizer n of a sample with many independent elements tends to."""
    gain = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2)
    return math.sqrt(2 / math.pi) * torch.sqrt((s * (1 - gain * (1 - sigma))) ** 2 + (gain * sigma) ** 2)


def scale_gradient(s: float, nr_weight: float, sigma: Tensor, *, normalized: bool = True, space: str = "x0") -> float:
    """d E[L_G] / d s with the weights of the fake frozen; exact, since the integrand has degree 2 in (z, eps)."""
    nodes, weights = hermite(3, dims=2)
    z, noise = (column.repeat(len(sigma))[:, None] for column in nodes.T)
    levels = sigma.repeat_interleave(len(nodes))
    n = (wide_distance(s, sigma) if normalized else torch.ones_like(sigma)).repeat_interleave(len(nodes))
    scale = f64(s).requires_grad_()
    x_g = scale * z
    x_sigma = flow.add_noise(x_g, noise, levels)
    a = 1 - levels
    fake = (a * s**2 / (a**2 * s**2 + levels**2))[:, None] * x_sigma
    teacher = (a / (a**2 + levels**2))[:, None] * x_sigma
    if space == "v":
        fake, teacher = (flow.velocity_from_x0(x_sigma, x0, levels) for x0 in (fake, teacher))
    loss = sgmd.fisher_loss(fake, teacher, n) - nr_weight * sgmd.nr_loss(fake, x_g, levels)
    return grad((loss * weights.repeat(len(sigma))) / len(sigma), scale).item()


def fixed_points(nr_weight: float, *, normalized: bool = True) -> list[float]:
    """The stds s at which gradient descent rests: where the gradient turns from negative to positive."""
    sigma = renoise_levels()

    def upward(s: float) -> bool:
        return scale_gradient(s, nr_weight, sigma, normalized=normalized) > 0

    grid = np.linspace(0.005, 1.505, 51).tolist()
    found = []
    for low, high in pairwise(grid):
        if upward(low) or not upward(high):
            continue
        for _ in range(16):
            middle = (low + high) / 2
            low, high = (low, middle) if upward(middle) else (middle, high)
        found.append((low + high) / 2)
    return found


@pytest.mark.parametrize("normalized", [True, False])
def test_without_nr_the_generator_rests_at_the_teacher_alone(normalized: bool) -> None:
    assert fixed_points(0.0, normalized=normalized) == [pytest.approx(1.0, abs=1e-6)]


def test_nr_contracts_the_fixed_point() -> None:
    """The method's .94/.89/.80/.54, with the default noise levels and n = E|x_g - f_T|."""
    figures = {0.05: 0.94556, 0.1: 0.89410, 0.2: 0.79830, 0.5: 0.54544}
    found = {nr_weight: fixed_points(nr_weight) for nr_weight in figures}
    assert found == {nr_weight: [pytest.approx(s, abs=1e-4)] for nr_weight, s in figures.items()}
    for (nr_weight, rests), rounded in zip(found.items(), (0.94, 0.89, 0.80, 0.54), strict=True):
        assert rests[0] == pytest.approx(rounded, abs=0.006), nr_weight


def test_without_the_normalizer_nr_contracts_more_and_collapses() -> None:
    """lambda is not scale-free: with n = 1 the same lambda weighs more wherever n < 1."""
    assert fixed_points(0.05, normalized=False) == [pytest.approx(0.867, abs=1e-3)]
    assert fixed_points(0.1, normalized=False) == [pytest.approx(0.721, abs=1e-3)]
    assert fixed_points(0.2, normalized=False) == []
    assert scale_gradient(0.5, 0.2, renoise_levels(), normalized=False) > 0, "it shrinks at every std"


def test_teacher_distance_tends_to_its_expectation_on_wide_latents() -> None:
    s, sigma, shape = 0.8, f64(0.3, 0.9), (1, 1, 200, 200)
    z, noise = (torch.stack([rng.normal(shape, 0, name, i) for i in range(2)]).double() for name in ("z", "noise"))
    x_sigma = flow.add_noise(s * z, noise, sigma)
    gain = flow.expand((1 - sigma) / ((1 - sigma) ** 2 + sigma**2), x_sigma)
    torch.testing.assert_close(teacher_distance(s * z, gain * x_sigma), wide_distance(s, sigma), atol=0, rtol=0.02)


# -- DMD2 -------------------------------------------------------------------------------------------------------


def test_dmd2_gradient_is_the_normalized_score_difference() -> None:
    at = draws()
    direction = dmd2.dmd_gradient(at.f_fake, at.f_teacher, at.n).detach()
    expected = (at.f_fake - at.f_teacher) / (at.n[:, None] + 1e-8) / 3
    torch.testing.assert_close(grad(dmd2.dmd_loss(at.x_g, direction), at.x_g), expected.detach(), atol=1e-9, rtol=1e-6)


def test_no_gradient_where_the_generator_is_the_teacher() -> None:
    at = draws(teacher=GENERATOR)
    direction = dmd2.dmd_gradient(at.f_fake, at.f_teacher, at.n).detach()
    assert grad(dmd2.dmd_loss(at.x_g, direction), at.x_g).abs().max() == 0
    assert sgmd_gradient(at, 0.0).abs().max() == 0


# -- why x0 space -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma, jacobian_below_one", [(0.1, False), (0.4, False), (0.6, True), (0.9, True)])
@pytest.mark.parametrize("s", [0.98, 1.02])
def test_in_velocity_space_the_sign_is_wrong_wherever_the_jacobian_is_below_one(
    s: float, sigma: float, jacobian_below_one: bool
) -> None:
    a = 1 - sigma
    assert (a * s**2 / (a**2 * s**2 + sigma**2) < 1) == jacobian_below_one
    toward_teacher = math.copysign(1, s - 1)
    assert toward_teacher * scale_gradient(s, 0.0, f64(sigma)) > 0
    in_velocity_space = toward_teacher * scale_gradient(s, 0.0, f64(sigma), space="v")
    assert (in_velocity_space < 0) == jacobian_below_one


def test_in_velocity_space_each_eigendirection_turns_where_its_jacobian_crosses_one() -> None:
    sigma = 0.5
    x_g = f64(0.4, -0.3)[None].requires_grad_()
    x_sigma = flow.add_noise(x_g, f64(1.0, 0.5)[None], f64(sigma))
    fake, teacher = (Gaussian(f64(0, 0), torch.diag(f64(*v))) for v in ((0.25, 4.0), (0.5, 8.0)))
    f_fake, f_teacher = fake.x0(x_sigma, f64(sigma)), teacher.x0(x_sigma, f64(sigma))
    assert fake.jacobian(sigma)[0, 0] < 1 < fake.jacobian(sigma)[1, 1]
    wanted = grad(sgmd.fisher_loss(f_fake, f_teacher, f64(1.0)), x_g)
    v_fake, v_teacher = (flow.velocity_from_x0(x_sigma, x0, f64(sigma)) for x0 in (f_fake, f_teacher))
    in_velocity_space = grad(sgmd.fisher_loss(v_fake, v_teacher, f64(1.0)), x_g)
    assert (torch.sign(in_velocity_space * wanted) == f64(-1, 1)).all()


# -- the inner loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [sgmd.rc_loss, fake_score_loss])
@pytest.mark.parametrize("sigma", [0.1, 0.625, 0.98])
def test_the_ideal_fake_minimises_the_inner_loss(loss, sigma: float) -> None:
    """Among all affine fakes: the expected loss is stationary there, and every other one is worse."""
    world, (nodes, weights) = random_gaussian(4, d=2), hermite(3, dims=4)
    x_g = world.mean + nodes[:, :2] @ torch.linalg.cholesky(world.covariance).T
    x_sigma = flow.add_noise(x_g, nodes[:, 2:], torch.full((len(nodes),), sigma, dtype=torch.float64))
    a, jacobian = 1 - sigma, world.jacobian(sigma)
    slope = (torch.eye(2, dtype=torch.float64) - jacobian) / sigma  # v = (x - f_F) / sigma
    offset = -(world.mean - a * jacobian @ world.mean) / sigma

    def expected_loss(slope: Tensor, offset: Tensor) -> Tensor:
        return weights @ loss(x_sigma @ slope.T + offset, nodes[:, 2:], x_g)

    for parameter in (slope, offset):
        parameter.requires_grad_()
    least = expected_loss(slope, offset)
    for gradient in torch.autograd.grad(least, (slope, offset)):
        assert gradient.abs().max() < 1e-10
    for row, column in product(range(2), repeat=2):
        changed = slope.detach().clone()
        changed[row, column] += 0.1
        assert expected_loss(changed, offset) > least + 1e-6
    assert expected_loss(slope, offset + 0.1) > least + 1e-6
