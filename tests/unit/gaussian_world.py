"""The Gaussian world of the closed-form tests: ideal scores, samples at several noise levels, exact quadrature.

x_g ~ N(mu, S), x_sigma = a x_g + sigma eps with a = 1 - sigma. The ideal fake score is the posterior mean
f_F(x) = E[x_g | x_sigma = x] = mu + J (x - a mu), whose Jacobian is J = a S (a² S + sigma² I)^-1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.objectives._distillation import teacher_distance

SIGMAS = (0.02, 0.3, 0.625, 0.8, 0.98)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Gaussian:
    """x ~ N(mean, covariance) in D dims."""

    mean: Tensor
    covariance: Tensor

    def jacobian(self, sigma: float) -> Tensor:
        """J = d E[x | x_sigma] / d x_sigma, `[D, D]`, by conditioning (x, eps) on what flow.add_noise makes of them."""
        d = len(self.mean)
        zero = torch.zeros(1, d, dtype=torch.float64)
        prior = torch.block_diag(self.covariance, torch.eye(d, dtype=torch.float64))
        mixing = torch.autograd.functional.jacobian(
            lambda pair: flow.add_noise(pair[:, :d], pair[:, d:], f64(sigma))[0], torch.cat([zero, zero], 1)
        )[:, 0]
        assert isinstance(mixing, Tensor)
        cross = prior[:d] @ mixing.T
        return cross @ torch.linalg.inv(mixing @ prior @ mixing.T)

    def x0(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """E[x | x_sigma], the ideal x0-prediction, `[B, D]`, with the graph through x_sigma."""
        rows = [
            self.mean + self.jacobian(s.item()) @ (x - (1 - s) * self.mean) for x, s in zip(x_sigma, sigma, strict=True)
        ]
        return torch.stack(rows)


def random_gaussian(seed: int, d: int = 3) -> Gaussian:
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, dtype=torch.float64, generator=draw)
    mean = torch.randn(d, dtype=torch.float64, generator=draw)
    return Gaussian(mean, root @ root.T + 0.2 * torch.eye(d, dtype=torch.float64))


GENERATOR, TEACHER = random_gaussian(1), random_gaussian(2)


def hermite(num_nodes: int, dims: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes `[N, dims]` and weights `[N]` of the standard normal: exact up to degree 2 num_nodes - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    weights = weights / weights.sum()
    grid = torch.tensor(list(product(nodes, repeat=dims)), dtype=torch.float64)
    return grid, torch.tensor([math.prod(w) for w in product(weights, repeat=dims)], dtype=torch.float64)


@dataclass(frozen=True)
class Draws:
    """Five samples at five noise levels, with graphs back to `x_g`."""

    x_g: Tensor
    sigma: Tensor
    f_fake: Tensor
    f_teacher: Tensor
    n: Tensor

    def times_a_jacobian(self, cotangent: Tensor, of: Gaussian = GENERATOR) -> Tensor:
        """a Jᵀ cotangent / numel per sample, with the Jacobian of the ideal prediction `of`."""
        rows = [(1 - s) * of.jacobian(s.item()).T @ c for s, c in zip(self.sigma, cotangent, strict=True)]
        return torch.stack(rows).detach() / self.x_g.shape[1]


def draws(fake: Gaussian = GENERATOR, teacher: Gaussian = TEACHER) -> Draws:
    torch.manual_seed(0)
    sigma = f64(*SIGMAS)
    scale = f64(0.1, 1.0, 3.0, 1.0, 10.0)[:, None]  # so that n differs from sample to sample
    x_g = (scale * torch.randn(len(SIGMAS), 3, dtype=torch.float64)).requires_grad_()
    x_sigma = flow.add_noise(x_g, torch.randn(len(SIGMAS), 3, dtype=torch.float64), sigma)
    f_fake, f_teacher = fake.x0(x_sigma, sigma), teacher.x0(x_sigma, sigma)
    return Draws(x_g, sigma, f_fake, f_teacher, teacher_distance(x_g, f_teacher))


def grad(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), at, retain_graph=True)[0]
