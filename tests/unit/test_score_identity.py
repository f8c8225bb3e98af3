"""SiD and SIM in closed form: what their gradients are, and of which divergence. See `gaussian_world`.

The generator is x_g = mean + root z with theta = (mean, root); for the expectations over z and the noise n is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from gaussian_world import GENERATOR, TEACHER, Draws, Gaussian, draws, f64, grad, hermite, random_gaussian
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.objectives import dmd2, sgmd, sid, sim
from sgmd_dist.objectives._distillation import NORMALIZER_EPS

ALPHAS = (0.0, 0.5, 1.0, 1.2)
HUBER_CS = (0.03, 0.3, 3.0)


def sid_loss(at: Draws, alpha: float) -> Tensor:
    identity = sid.identity_term(at.x_g, at.f_fake, at.f_teacher - at.f_fake, at.n)
    return (1 - alpha) * sid.fisher_term(at.f_fake, at.f_teacher, at.n) + identity


def sim_loss(at: Draws, huber_c: float) -> Tensor:
    delta = at.f_teacher - at.f_fake
    return sim.huber_shrinkage(delta, huber_c) * sid.identity_term(at.x_g, at.f_fake, delta, at.n)


# -- the gradient of a sample -----------------------------------------------------------------------------------


def through_both_jacobians(at: Draws, cotangent: Tensor) -> Tensor:
    """a (J_T - J_F)ᵀ cotangent / numel."""
    return at.times_a_jacobian(cotangent, TEACHER) - at.times_a_jacobian(cotangent, GENERATOR)


def through_the_identity(at: Draws, direction: Tensor) -> Tensor:
    """(a J_F - 1)ᵀ u / numel: what the factor f_F - x_g gives."""
    return at.times_a_jacobian(direction, GENERATOR) - (direction / at.x_g.shape[1]).detach()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_sid_gradient_is_the_closed_form(alpha: float) -> None:
    """[2 (1 - alpha) a (J_T - J_F)ᵀ Δ + a (J_T - J_F)ᵀ (f_F - x_g) + (a J_F - 1)ᵀ Δ] / n."""
    at = draws()
    delta, scale = at.f_teacher - at.f_fake, at.n[:, None] + 1e-8
    expected = through_both_jacobians(at, (2 * (1 - alpha) * delta + at.f_fake - at.x_g) / scale)
    expected = expected + through_the_identity(at, delta / scale)
    torch.testing.assert_close(grad(sid_loss(at, alpha), at.x_g), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("huber_c", HUBER_CS)
def test_sim_gradient_is_the_closed_form(huber_c: float) -> None:
    """As SiD's with d'(Δ) for Δ, and its derivative s (1 - s² Δ Δᵀ / c²) in front of a (J_T - J_F)."""
    at = draws()
    delta, scale, c = at.f_teacher - at.f_fake, at.n[:, None] + 1e-8, huber_c * 3**0.5
    s = (1 + delta.square().sum(1, keepdim=True) / c**2) ** -0.5
    tail = at.f_fake - at.x_g
    bent = s * (tail - s**2 / c**2 * delta * (delta * tail).sum(1, keepdim=True))
    expected = through_both_jacobians(at, bent / scale) + through_the_identity(at, s * delta / scale)
    torch.testing.assert_close(grad(sim_loss(at, huber_c), at.x_g), expected, atol=1e-9, rtol=1e-9)


def test_sid_holds_the_direction_of_dmd_less_what_sgmd_keeps_of_it() -> None:
    """At alpha = 1: DMD2's gradient - SGMD's, which is a Jᵀ times it, and a term along f_F - x_g."""
    at = draws()
    dmd = grad(dmd2.dmd_loss(at.x_g, dmd2.dmd_gradient(at.f_fake, at.f_teacher, at.n).detach()), at.x_g)
    kept = grad(sgmd.fisher_loss(at.f_fake, at.f_teacher, at.n), at.x_g)
    rest = through_both_jacobians(at, (at.f_fake - at.x_g) / (at.n[:, None] + 1e-8))
    torch.testing.assert_close(grad(sid_loss(at, 1.0), at.x_g), dmd - kept + rest, atol=1e-9, rtol=1e-9)


def test_sid_feels_a_direction_that_the_generator_has_lost() -> None:
    """Where SGMD's gradient is filtered off, SiD's is the whole of DMD's, which leads back; see test_gaussian."""
    lost = Gaussian(GENERATOR.mean, torch.diag(f64(1.0, 1.0, 0.0)))
    teacher = Gaussian(GENERATOR.mean + 1.0, torch.diag(f64(1.0, 1.0, 2.0)))
    at = draws(fake=lost, teacher=teacher)
    x_g = torch.cat([at.x_g[:, :2], GENERATOR.mean[2].expand(len(at.x_g), 1)], 1).detach().requires_grad_()
    x_sigma = flow.add_noise(x_g, torch.zeros_like(x_g), at.sigma)
    on = Draws(x_g, at.sigma, lost.x0(x_sigma, at.sigma), teacher.x0(x_sigma, at.sigma), torch.ones_like(at.n))
    dmd = (on.f_fake - on.f_teacher).detach()[:, 2] / 3
    assert (dmd.abs() > 1e-5).all()
    torch.testing.assert_close(grad(sid_loss(on, 1.0), x_g)[:, 2], dmd, atol=1e-9, rtol=1e-6)
    assert grad(sgmd.fisher_loss(on.f_fake, on.f_teacher, on.n), x_g)[:, 2].abs().max() < 1e-12


def test_no_gradient_where_the_generator_is_the_teacher() -> None:
    """Of each sample, not only on average."""
    at = draws(teacher=GENERATOR)
    losses = [sid_loss(at, alpha) for alpha in ALPHAS] + [sim_loss(at, huber_c) for huber_c in HUBER_CS]
    for loss in losses:
        assert grad(loss, at.x_g).abs().max() == 0 and loss.abs().max() == 0


# -- the pseudo-Huber distance ------------------------------------------------------------------------------------


def huber_gradient(difference: Tensor, huber_c: float) -> Tensor:
    """d'(Δ)."""
    return flow.expand(sim.huber_shrinkage(difference, huber_c), difference) * difference


def distance(difference: Tensor, huber_c: float) -> Tensor:
    """c² (sqrt(1 + |Δ|² / c²) - 1) per sample, c = huber_c sqrt(numel)."""
    c = huber_c * difference[0].numel() ** 0.5
    return c**2 * ((1 + difference.flatten(1).square().sum(1) / c**2).sqrt() - 1)


@pytest.mark.parametrize("huber_c", HUBER_CS)
def test_the_direction_of_sim_is_the_gradient_of_the_pseudo_huber_distance(huber_c: float) -> None:
    difference = torch.randn(4, 3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    difference = (difference * f64(0.01, 0.3, 1, 30).reshape(-1, 1, 1, 1, 1)).requires_grad_()
    direction = huber_gradient(difference, huber_c)
    torch.testing.assert_close(direction, grad(distance(difference, huber_c), difference), atol=1e-14, rtol=1e-12)
    assert (direction.flatten(1).norm(dim=1) < huber_c * 24**0.5).all(), "bounded by c"


def test_a_large_constant_gives_sid_at_alpha_one() -> None:
    at = draws()
    for huber_c, tolerance in ((1e2, 1e-2), (1e7, 1e-12)):
        torch.testing.assert_close(sim_loss(at, huber_c), sid_loss(at, 1.0), atol=0, rtol=tolerance)
        ours, theirs = (grad(loss, at.x_g) for loss in (sim_loss(at, huber_c), sid_loss(at, 1.0)))
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    assert not torch.allclose(sim_loss(at, 0.3), sid_loss(at, 1.0), rtol=0.1)


def test_a_small_constant_leaves_the_direction_alone() -> None:
    at = draws()
    delta = at.f_teacher - at.f_fake
    unit = delta / delta.norm(dim=1, keepdim=True)
    torch.testing.assert_close(huber_gradient(delta, 1e-6), 1e-6 * 3**0.5 * unit, atol=0, rtol=1e-6)


def test_the_constant_is_one_for_latents_of_any_size() -> None:
    """A sample repeated 16 times over is bent as the sample; with c itself fixed it would be bent more."""
    small = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    large = small.repeat(1, 1, 1, 4, 4)
    torch.testing.assert_close(sim.huber_shrinkage(large, 0.5), sim.huber_shrinkage(small, 0.5))
    torch.testing.assert_close(huber_gradient(large, 0.5), huber_gradient(small, 0.5).repeat(1, 1, 1, 4, 4))


# -- the score identity, and the divergence that is descended -----------------------------------------------------


@dataclass(frozen=True)
class Expectation:
    """Expectations over z and the noise in 2 dims at one sigma, with an ideal fake of frozen weights."""

    sigma: float
    num_nodes: int

    def __post_init__(self) -> None:
        world = random_gaussian(5, d=2)
        nodes, weights = hermite(self.num_nodes, dims=4)
        root = torch.linalg.cholesky(world.covariance)
        theta = (world.mean.clone().requires_grad_(), root.clone().requires_grad_())
        x_g = theta[0] + nodes[:, :2] @ theta[1].T
        x_sigma = flow.add_noise(x_g, nodes[:, 2:], torch.full((len(nodes),), self.sigma, dtype=torch.float64))
        values = {
            "theta": theta,
            "weights": weights,
            "x_g": x_g,
            "x_sigma": x_sigma,
            "f_fake": self.predict(world.mean, world.covariance, x_sigma),
            "f_teacher": self.teacher(x_sigma),
            "n": torch.full((len(nodes),), 1 - NORMALIZER_EPS, dtype=torch.float64),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def predict(self, mean: Tensor, covariance: Tensor, x_sigma: Tensor) -> Tensor:
        return mean + (x_sigma - (1 - self.sigma) * mean) @ Gaussian(mean, covariance).jacobian(self.sigma).T

    def teacher(self, x_sigma: Tensor) -> Tensor:
        world = random_gaussian(6, d=2)
        return self.predict(world.mean, world.covariance, x_sigma)

    def over_theta(self, values: Tensor) -> list[Tensor]:
        """Gradient of the expectation of per-sample `values` with respect to mean and root."""
        return list(torch.autograd.grad((self.weights * values).sum(), self.theta, retain_graph=True))

    def divergence(self, distance: Callable[[Tensor], Tensor], *, x_sigma_moves: bool) -> list[Tensor]:
        """Gradient of E distance(f_T - f*), with f* the ideal fake of theta, whose own change counts here."""
        mean, root = self.theta
        x_sigma = self.x_sigma if x_sigma_moves else self.x_sigma.detach()
        return self.over_theta(distance(self.teacher(x_sigma) - self.predict(mean, root @ root.T, x_sigma)))


def half_square(difference: Tensor) -> Tensor:
    """½ mean |Δ|² per sample: the losses are means over the elements."""
    return difference.square().mean(1) / 2


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-11) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sigma", [0.3, 0.625, 0.98])
def test_the_score_identity(sigma: float) -> None:
    """E[u(x_sigma)ᵀ (f_F - x_g)] = 0 where the fake is ideal, though no sample's term is; a lag of it shows."""
    world = Expectation(sigma, num_nodes=4)
    constant, linear = torch.ones_like(world.x_g), world.x_sigma
    for direction in (constant, linear, world.f_teacher - world.f_fake, world.f_teacher):
        terms = sid.identity_term(world.x_g, world.f_fake, direction, world.n)
        assert terms.abs().max() > 1e-2 and abs(world.weights @ terms) < 1e-10
        lagging = sid.identity_term(world.x_g, world.f_fake + 0.1, direction, world.n)
        torch.testing.assert_close(world.weights @ lagging, 0.1 * (world.weights @ direction).mean(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("sigma", [0.3, 0.625, 0.98])
def test_sid_at_alpha_one_descends_the_fisher_divergence_at_fixed_noisy_samples(sigma: float) -> None:
    """½ E |f_T - f_F|²: only the ideal fake changes with theta, the distribution of x_sigma is held."""
    world = Expectation(sigma, num_nodes=3)
    assert_equal(world.over_theta(sid_loss(world, 1.0)), world.divergence(half_square, x_sigma_moves=False))


@pytest.mark.parametrize("sigma", [0.3, 0.625, 0.98])
def test_sid_at_alpha_one_half_descends_the_whole_fisher_divergence(sigma: float) -> None:
    """½ E |f_T - f_F|² with the noisy samples moving too."""
    world = Expectation(sigma, num_nodes=3)
    assert_equal(world.over_theta(sid_loss(world, 0.5)), world.divergence(half_square, x_sigma_moves=True))


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.2])
def test_alpha_weighs_the_two(alpha: float) -> None:
    world = Expectation(0.4, num_nodes=3)
    whole, fixed = (world.divergence(half_square, x_sigma_moves=moves) for moves in (True, False))
    mixed = [2 * (1 - alpha) * a + (2 * alpha - 1) * b for a, b in zip(whole, fixed, strict=True)]
    assert_equal(world.over_theta(sid_loss(world, alpha)), mixed)


@pytest.mark.parametrize("huber_c", [0.5, 2.0])
def test_sim_descends_the_pseudo_huber_divergence_at_fixed_noisy_samples(huber_c: float) -> None:
    world = Expectation(0.625, num_nodes=18)
    expected = world.divergence(lambda difference: distance(difference, huber_c) / 2, x_sigma_moves=False)
    assert_equal(world.over_theta(sim_loss(world, huber_c)), expected, tolerance=1e-5)


# -- one dimension: x_g = s z, teacher N(0, 1) --------------------------------------------------------------------


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of x_g, f_F, f_T and n


def scale_gradient(s: float, loss: Loss, num_nodes: int = 3) -> float:
    """d E[L_G] / d s over all noise levels of the defaults, with the wide latents' n = E |x_g - f_T|."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    sigma = flow.renoise_sigma(u, 5.0, 0.02, 0.98)
    nodes, weights = hermite(num_nodes, dims=2)
    z, noise = (column.repeat(len(sigma))[:, None] for column in nodes.T)
    levels, weights = sigma.repeat_interleave(len(nodes)), weights.repeat(len(sigma)) / len(sigma)
    a, scale = 1 - levels, f64(s).requires_grad_()
    x_g = scale * z
    x_sigma = flow.add_noise(x_g, noise, levels)
    gains = [a * v / (a**2 * v + levels**2) for v in (s**2, 1.0)]
    f_fake, f_teacher = (gain[:, None] * x_sigma for gain in gains)
    n = (2 / torch.pi) ** 0.5 * torch.sqrt((s * (1 - gains[1] * a)) ** 2 + (gains[1] * levels) ** 2)
    return grad(weights * loss(x_g, f_fake, f_teacher, n), scale).item()


def sid_scale_gradient(s: float, alpha: float) -> float:
    return scale_gradient(s, lambda x_g, fake, teacher, n: sid_loss(Draws(x_g, n, fake, teacher, n), alpha))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_rests_at_the_teachers_std_without_contraction(alpha: float) -> None:
    for s in (0.01, 0.3, 0.99):
        assert sid_scale_gradient(s, alpha) < 0
    for s in (1.01, 2.0, 5.0):
        assert sid_scale_gradient(s, alpha) > 0
    assert abs(sid_scale_gradient(1.0, alpha)) < 1e-12


def dmd(x_g: Tensor, fake: Tensor, teacher: Tensor, n: Tensor) -> Tensor:
    return dmd2.dmd_loss(x_g, dmd2.dmd_gradient(fake, teacher, n).detach())


def robust(x_g: Tensor, fake: Tensor, teacher: Tensor, n: Tensor) -> Tensor:
    return sim_loss(Draws(x_g, n, fake, teacher, n), huber_c=0.3)


@pytest.mark.parametrize("loss, num_nodes", [(dmd, 3), (robust, 12)])
def test_dmd2_and_sim_rest_there_too(loss: Loss, num_nodes: int) -> None:
    gradients = [scale_gradient(s, loss, num_nodes) for s in (0.3, 0.99, 1.01, 2.0, 5.0)]
    assert [gradient > 0 for gradient in gradients] == [False, False, True, True, True]
    assert abs(scale_gradient(1.0, loss, num_nodes)) < 1e-12


def test_a_larger_alpha_widens_a_narrow_generator_faster_and_loses_a_wide_one() -> None:
    narrow = [sid_scale_gradient(0.3, alpha) for alpha in (0.5, 1.0, 1.2, 2.0)]
    assert narrow == sorted(narrow, reverse=True) and narrow[-1] < 1.8 * narrow[0] < 0
    wide = [sid_scale_gradient(3.0, alpha) for alpha in (0.5, 1.0, 1.2, 2.0)]
    assert wide == sorted(wide, reverse=True) and wide[2] > 0 > wide[3], "alpha = 2 widens it further"


def test_a_collapsed_generator_is_pulled_back_harder_than_by_sgmd() -> None:
    def fisher(x_g: Tensor, fake: Tensor, teacher: Tensor, n: Tensor) -> Tensor:
        return sgmd.fisher_loss(fake, teacher, n)

    ratios = [sid_scale_gradient(s, 1.0) / scale_gradient(s, fisher) for s in (0.5, 0.1, 0.02)]
    assert ratios == sorted(ratios) and ratios[0] > 1
