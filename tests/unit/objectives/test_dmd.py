"""DMD: the generator phase against the method written out, and what the regression on pairs is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distillation_world import SHAPE, World, mean, naive_generator_loss, naive_rollout
from torch import Tensor

from sgmd_dist import flow, rng
from sgmd_dist.errors import UserError
from sgmd_dist.objectives import dmd
from sgmd_dist.objectives.base import Passes
from sgmd_dist.objectives.dmd2 import dmd_gradient, dmd_loss
from sgmd_dist.recipe_file import load_recipe

REPO = Path(__file__).parents[3]
OFF_AT_5 = {"schedule": "piecewise", "points": [[0, 0.5], [5, 0.0]]}


@pytest.fixture
def world() -> World:
    """Its batch holds pairs."""
    world = World()
    noise = rng.sample_normal(SHAPE, 0, "pairs", world.batch.ids, device="cpu").bfloat16()
    world.batch = replace(world.batch, noise=noise)
    return world


def make_dmd(**keys: Any) -> dmd.Dmd:
    return dmd.build(dmd.Section.model_validate({"name": "dmd", **keys}))


# -- the phases -------------------------------------------------------------------------------------------------


def naive_regression(world: World) -> Tensor:
    """MSE of one step from the pairs' noise against the pairs' samples, written out."""
    assert world.batch.noise is not None and world.batch.latents is not None
    z = world.batch.noise.float()
    return mean((z - world.generator.bare(z, torch.ones(2), world.batch.prompt_embeds) - world.batch.latents) ** 2)


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_generator_phase_is_the_method_written_out(world: World, weight: float) -> None:
    losses = world.run(make_dmd(regression_weight=weight).phases(0)[0])
    x_g = naive_rollout(world, rng.sample_normal(SHAPE, 7, "rollout", world.batch.ids, device="cpu"), exit_index=0)
    regression = naive_regression(world)
    naive = naive_generator_loss(world, "dmd2", x_g) + weight * regression
    torch.testing.assert_close(losses.per_sample, naive, atol=0, rtol=1e-6)
    torch.testing.assert_close(losses.metrics["generator/regression"], regression.detach(), atol=0, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(loss.mean(), world.generator.weight)[0] for loss in (losses.per_sample, naive))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)


def test_the_passes_are_the_declared_ones(world: World) -> None:
    """Two of the generator with gradients: its own sample and the pair's."""
    phase = make_dmd().phases(0)[0]
    world.run(phase)
    assert world.counts() == {"teacher": 1, "generator": 2, "fake_score": 1}
    assert world.generator.graph == [True, True] and world.fake.graph == [False]
    counts = {role: sum(p.most for p in phase.passes if p.role == role) for role in world.roles}
    assert counts == world.counts()
    assert phase.passes[-1] == Passes("generator", "weights")


def test_both_samples_are_one_step_from_their_noise(world: World) -> None:
    world.run(make_dmd().phases(0)[0])
    fresh, of_the_pair = world.generator.x
    assert torch.equal(fresh, rng.sample_normal(SHAPE, 7, "rollout", world.batch.ids, device="cpu"))
    assert world.batch.noise is not None and torch.equal(of_the_pair, world.batch.noise.float())
    assert all(sigma.tolist() == [1.0, 1.0] for sigma in world.generator.sigma)
    assert world.generator.levels == [1.0, 1.0]


def test_one_fake_update_on_the_same_samples(world: World) -> None:
    """As in the paper's algorithm 1: no second rollout."""
    phases = make_dmd().phases(0)
    assert [(phase.role, phase.data) for phase in phases] == [("generator", "next"), ("fake_score", "same")]
    for phase in phases:
        world.run(phase)
    assert world.counts() == {"teacher": 1, "generator": 2, "fake_score": 2}


def test_the_weight_may_end_and_its_pass_with_it(world: World) -> None:
    objective = make_dmd(regression_weight=OFF_AT_5)
    assert objective.needs_pairs == "objective.regression_weight > 0"
    assert [len(objective.phases(step)[0].passes) for step in (4, 5)] == [
        len(objective.phases(0)[0].passes),
        len(make_dmd(regression_weight=0).phases(0)[0].passes),
    ]
    world.state.step = 5
    losses = world.run(objective.phases(5)[0])
    assert "generator/regression" not in losses.metrics and world.counts()["generator"] == 1


def test_shards_without_pairs_are_a_users_mistake(world: World) -> None:
    for missing in ("noise", "latents"):
        with pytest.raises(UserError, match=r"data\.shards: objective\.regression_weight > 0 needs pairs.*prepare\.py"):
            world.run(make_dmd().phases(0)[0], replace(world.batch, **{missing: None}))


def test_without_the_regression_no_pairs_are_needed(world: World) -> None:
    objective = make_dmd(regression_weight=0)
    assert objective.needs_pairs is None and objective.needs_latents is None
    losses = world.run(objective.phases(0)[0], replace(world.batch, noise=None, latents=None))
    assert losses.per_sample.isfinite().all()


@pytest.mark.parametrize(
    "key, value, expected", [("student_steps", 4, "dmd2 trains generators of several"), ("rollout", "data", "euler")]
)
def test_several_steps_are_refused(tmp_path: Path, key: str, value: object, expected: str) -> None:
    recipe = {"base": str(REPO / "recipes/tiny_sgmd.yaml"), "objective": {"name": "dmd", key: value}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=rf"objective\.{key} = .*{value}.*{expected}"):
        load_recipe(tmp_path / "recipe.yaml")


# -- the regression ---------------------------------------------------------------------------------------------


def test_regression_loss_is_a_mean_per_sample_without_gradient_to_the_teachers() -> None:
    draw = torch.Generator().manual_seed(0)
    x0, y = (torch.randn(3, 2, 2, 3, 2, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(2))
    ours = dmd.regression_loss(x0, y)
    rows = zip(x0.flatten(1).tolist(), y.flatten(1).tolist(), strict=True)
    naive = [sum((a - b) ** 2 for a, b in zip(*row, strict=True)) / 24 for row in rows]
    assert ours.tolist() == pytest.approx(naive, rel=1e-12)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mine, other = torch.autograd.grad((ours * weights).sum(), [x0, y], allow_unused=True)
    assert other is None and mine is not None
    expected = weights[:, None, None, None, None] * 2 * (x0 - y).detach() / 24
    torch.testing.assert_close(mine, expected, atol=0, rtol=1e-12)


def test_the_pairs_of_a_gaussian_hold_the_generators_scale() -> None:
    """Data N(0, s²): the teacher's chain makes s z of z, so the regression of G(z) = a z is (a - s)² mean z²."""
    s, z = 0.4, rng.normal((4096, 1), 0, "z").double()

    def velocity(x: Tensor, sigma: Tensor, level: float) -> Tensor:
        v = flow.expand(sigma, x).double()
        x0 = (1 - v) * s**2 / ((1 - v) ** 2 * s**2 + v**2) * x
        return (x - x0) / v

    y = flow.integrate(velocity, z, flow.sampling_sigmas(2000, 5.0))
    torch.testing.assert_close(y, s * z, atol=0, rtol=5e-3)
    for a in (0.1, s, 0.9):
        scale = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        loss = dmd.regression_loss(scale * z, y).mean()
        expected = (a - s) ** 2 * (z**2).mean().item()
        assert loss.item() == pytest.approx(expected, rel=2e-2, abs=1e-5)
        slope = torch.autograd.grad(loss, scale)[0].item()
        assert slope == pytest.approx(2 * (a - s) * (z**2).mean().item(), rel=2e-2, abs=5e-3)


def test_the_regression_brings_back_a_mode_that_distribution_matching_has_lost() -> None:
    """Two modes, of which the generator makes one: there both scores agree, and only the pairs speak of the other."""
    mode, s, sigma = 4.0, 0.1, 0.2
    z = rng.normal((4096, 1), 0, "z").double()
    x_g = (mode + s * z).requires_grad_()
    level = torch.full((len(z),), sigma, dtype=torch.float64)
    x = flow.add_noise(x_g.detach(), rng.normal((4096, 1), 0, "noise").double(), level)
    f_teacher = denoised(x, sigma, s, [-mode, mode])
    n = (x_g.detach() - f_teacher).abs().mean(1)
    matching = dmd_loss(x_g, dmd_gradient(denoised(x, sigma, s, [mode]), f_teacher, n)).sum()
    assert torch.autograd.grad(matching, x_g)[0].abs().max() < 1e-6

    y = torch.where(z < 0, -mode, mode) + s * z  # the chain's map keeps the order of a line
    regression = dmd.regression_loss(x_g, y).sum()
    pull = torch.autograd.grad(regression, x_g)[0]
    torch.testing.assert_close(pull, torch.where(z < 0, 4 * mode, 0.0).double())


def denoised(x: Tensor, sigma: float, s: float, modes: list[float]) -> Tensor:
    """E[x0 | x_sigma] of equally weighted Gaussians at `modes` with deviation `s`."""
    a, means = 1 - sigma, torch.tensor(modes, dtype=torch.float64)
    variance = a**2 * s**2 + sigma**2
    share = torch.softmax(-((x - a * means) ** 2) / (2 * variance), dim=1)
    each = means + a * s**2 / variance * (x - a * means)
    return (share * each).sum(1, keepdim=True)
