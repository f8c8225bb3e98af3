"""Noise levels of networks with experts: one expert serves a micro-batch, and the levels keep their distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation_world import DIVERSE, STUDENT_SIGMAS, World, make_batch, make_dmd2, make_sgmd
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.objectives import flow_matching
from sgmd_dist.objectives.base import StepState

BOUNDARY = 0.875
SHARE_ABOVE = 0.417  # of the 1000 timesteps at shift 5


@pytest.fixture
def world() -> World:
    """Every role has two experts."""
    world = World()
    for network in world.roles.values():
        network.boundaries = (BOUNDARY,)
    return world


def renoised(world: World, roles: tuple[str, ...] = ("fake_score", "teacher"), **draw: Any) -> tuple[Tensor, float]:
    """Levels and the level that travels beside them, of a micro-batch of two samples."""
    step, unit, num_units = draw.get("step", 0), draw.get("unit", 0), draw.get("num_units", 1)
    objective = make_sgmd(exit_groups=draw.get("groups", 1))
    state, batch = StepState(step, 7, num_units, unit), make_batch(num_units * step + unit)
    x_g, networks = torch.zeros(2, *batch.latent_shape), [world.roles[name] for name in roles]
    at = objective.renoise(networks, x_g, batch, state, draw.get("purpose", "generator"), draw.get("update", 0))
    return at.sigma, at.level


def is_above(sigma: Tensor, boundary: float = BOUNDARY) -> bool:
    """On which side of the boundary a batch lies; all of it does."""
    above = sigma >= boundary
    assert (above == above[0]).all(), sigma
    return bool(above[0])


def test_a_micro_batch_lies_on_one_side_and_the_levels_keep_their_distribution(world: World) -> None:
    draws = [renoised(world, step=step) for step in range(1200)]
    assert all(is_above(sigma) == flow.reaches(level, BOUNDARY) for sigma, level in draws)
    assert sum(is_above(sigma) for sigma, _ in draws) / 1200 == pytest.approx(SHARE_ABOVE, abs=0.03)
    for network in world.roles.values():
        network.boundaries = ()
    plain = torch.cat([renoised(world, step=step)[0] for step in range(1200)])
    quantiles = torch.linspace(0.02, 0.98, 25)
    levels = torch.cat([sigma for sigma, _ in draws])
    as_timesteps = [flow.shift_sigma(x, 1 / 5).quantile(quantiles) for x in (levels, plain)]
    torch.testing.assert_close(*as_timesteps, atol=0.04, rtol=0)


def test_without_experts_the_draw_of_a_sample_is_its_own(world: World) -> None:
    """As if there were none: two samples of a micro-batch lie on different sides."""
    for network in world.roles.values():
        network.boundaries = ()
    sides = [(renoised(world, step=step)[0] >= BOUNDARY).tolist() for step in range(40)]
    assert any(len(set(side)) == 2 for side in sides)


def test_the_expert_is_drawn_once_per_group_of_units(world: World) -> None:
    """Units are dealt to ranks round-robin, so one expert per group of consecutive units is one on all ranks."""
    seen = set()
    for step in range(12):
        sides = [is_above(renoised(world, step=step, unit=unit, num_units=12, groups=3)[0]) for unit in range(12)]
        groups = [sides[start : start + 4] for start in (0, 4, 8)]
        assert all(len(set(group)) == 1 for group in groups)
        seen.add(tuple(group[0] for group in groups))
    assert len(seen) > 3, "groups draw independently"


@pytest.mark.parametrize("other", [{"purpose": "fake"}, {"update": 1}])
def test_phases_and_updates_draw_their_own_expert(world: World, other: dict[str, Any]) -> None:
    sides = [[is_above(renoised(world, step=step, **draw)[0]) for step in range(40)] for draw in ({}, other)]
    assert sides[0] != sides[1]


def test_only_the_networks_that_run_part_the_levels(world: World) -> None:
    """A teacher with experts and a fake score without: the fake score's own phase mixes levels as ever."""
    world.fake.boundaries = ()
    alone = [renoised(world, ("fake_score",), step=step, purpose="fake")[0] for step in range(40)]
    world.teacher.boundaries = ()
    plain = [renoised(world, step=step, purpose="fake")[0] for step in range(40)]
    assert all(torch.equal(a, b) for a, b in zip(alone, plain, strict=True))


def test_networks_with_different_boundaries_have_a_batch_on_one_side_of_both(world: World) -> None:
    world.fake.boundaries = (0.5,)
    sides = {
        tuple(is_above(renoised(world, step=step)[0], boundary) for boundary in (0.5, BOUNDARY)) for step in range(60)
    }
    assert sides == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("make", [lambda: make_sgmd(**DIVERSE), make_dmd2, lambda: make_sgmd(rollout="data")])
def test_every_forward_of_a_step_is_told_a_level_on_its_batchs_side(world: World, make: Any) -> None:
    for step in range(6):
        world.state.step = step
        for phase in make().phases(step):
            world.run(phase)
    for network in world.roles.values():
        assert len(network.levels) == len(network.sigma) > 0
        for level, sigma in zip(network.levels, network.sigma, strict=True):
            assert isinstance(level, float) and is_above(sigma) == flow.reaches(level, BOUNDARY)
    sides = {flow.reaches(level, BOUNDARY) for level in world.fake.levels}
    assert sides == {True, False}


def test_rollouts_go_from_one_expert_to_the_next(world: World) -> None:
    """Student levels 1 and 0.9375 belong to the expert above 0.875, 0.8333 and 0.625 to the one below."""
    objective = make_sgmd()
    objective.exit_index = lambda *args: 3  # type: ignore[method-assign]
    world.run(objective.phases(0)[0])
    assert world.generator.levels == pytest.approx(STUDENT_SIGMAS[:4])
    assert [is_above(sigma) for sigma in world.generator.sigma] == [True, True, False, False]


def test_flow_matching_draws_from_one_expert_too(world: World) -> None:
    objective = flow_matching.build(flow_matching.Section(name="flow_matching", sigma_shift=3.0, caption_dropout=0.0))
    above = []
    for step in range(600):
        world.state.step = step
        world.run(objective.phases(step)[0], make_batch(step))
        [level], [sigma] = world.generator.levels, world.generator.sigma
        assert flow.reaches(level, BOUNDARY) == is_above(sigma)
        above.append(is_above(sigma))
        world.generator.levels.clear()
        world.generator.sigma.clear()
    assert sum(above) / 600 == pytest.approx(1 - flow.shift_sigma(BOUNDARY, 1 / 3), abs=0.04)
