"""The phases of the objectives: cadence, exit indices, the inner loop, and where samples come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from distillation_world import (
    DIVERSE,
    SHAPE,
    STUDENT_SIGMAS,
    World,
    exits,
    make_batch,
    make_dmd2,
    make_sgmd,
    mean,
    naive_generator_loss,
    naive_rollout,
    spy_samples,
)
from torch import Tensor

from sgmd_dist import rng
from sgmd_dist.batch import Batch
from sgmd_dist.errors import UserError
from sgmd_dist.objectives._distillation import Distillation
from sgmd_dist.objectives.base import Losses, StepState


@pytest.fixture
def world() -> World:
    return World()


# -- cadence ----------------------------------------------------------------------------------------------------


def cadence(objective: Distillation, step: int = 0) -> list[tuple[str, str]]:
    return [(phase.role, phase.data) for phase in objective.phases(step)]


def test_sgmd_is_one_to_one_and_dmd2_one_to_five() -> None:
    assert cadence(make_sgmd()) == [("generator", "next"), ("fake_score", "next")]
    assert cadence(make_dmd2()) == [("generator", "next"), *[("fake_score", "next")] * 5]


def test_reuse_takes_the_batches_of_the_generator_phase() -> None:
    assert cadence(make_dmd2(inner_sample="reuse", fake_updates=2)) == [
        ("generator", "next"),
        ("fake_score", "same"),
        ("fake_score", "same"),
    ]


def test_fake_updates_may_be_scheduled() -> None:
    objective = make_sgmd(fake_updates={"schedule": "piecewise", "points": [[0, 5], [10, 2], [20, 1]]})
    assert [len(objective.phases(step)) - 1 for step in (0, 9, 10, 19, 20, 999)] == [5, 5, 2, 2, 1, 1]
    ramp = make_sgmd(fake_updates={"schedule": "linear", "from": 1, "to": 3, "steps": 4})
    assert [len(ramp.phases(step)) - 1 for step in range(6)] == [1, 2, 2, 2, 3, 3]


def test_fewer_than_one_fake_update_is_refused() -> None:
    for too_few in (0.5, {"schedule": "linear", "from": 0.2, "to": 2, "steps": 9}):
        with pytest.raises(ValueError, match="expected a number >= 1, at every step"):
            make_sgmd(fake_updates=too_few)


def test_an_empty_range_of_noise_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma_min <= sigma_max"):
        make_sgmd(sigma_min=0.5, sigma_max={"schedule": "linear", "from": 0.98, "to": 0.4, "steps": 9})


def test_more_diversity_steps_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="steps"):
        make_sgmd(diversity={"weight": 0.05, "steps": 31, "total_steps": 30})


# -- exit index -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, domain", [({}, {0, 1, 2, 3}), (DIVERSE, {1, 2, 3}), ({"student_steps": 1, **DIVERSE}, {0})]
)
@pytest.mark.parametrize("exit_draw", ["independent", "stratified"])
def test_exit_index_covers_its_domain_evenly(keys: dict[str, Any], domain: set[int], exit_draw: str) -> None:
    objective = make_sgmd(exit_draw=exit_draw, exit_groups=len(domain), **keys)
    counts = Counter(exits(objective, len(domain), step)[0] for step in range(1200))
    assert set(counts) == domain
    assert all(count == pytest.approx(1200 / len(domain), rel=0.2) for count in counts.values())


@pytest.mark.parametrize("keys, shares", [({}, [0.1, 0.2, 0.3, 0.4]), (DIVERSE, [0, 2 / 9, 3 / 9, 4 / 9])])
def test_exits_are_drawn_by_their_weights(keys: dict[str, Any], shares: list[float]) -> None:
    objective = make_sgmd(exit_weights=[1, 2, 3, 4], **keys)
    counts = Counter(exits(objective, 1, step)[0] for step in range(1200))
    assert [counts[i] / 1200 for i in range(4)] == pytest.approx(shares, abs=0.04)
    before, at_exit = [passes for passes in objective.phases(0)[0].passes if passes.role == "generator"][-2:]
    known = bool(keys)
    assert before.mean == pytest.approx(sum(share * max(i - known, 0) for i, share in enumerate(shares)))
    assert (before.most, at_exit.mean, at_exit.most) == (3 - known, 1, 1)


def test_exit_domain_follows_the_diversity_schedule() -> None:
    off_at_100 = {"schedule": "piecewise", "points": [[0, 0.05], [100, 0.0]]}
    objective = make_sgmd(diversity={"weight": off_at_100})
    assert 0 not in {exits(objective, 1, step)[0] for step in range(100)}
    assert {exits(objective, 1, step)[0] for step in range(100, 200)} == {0, 1, 2, 3}


@pytest.mark.parametrize("keys, choices", [({}, [0, 1, 2, 3]), (DIVERSE, [1, 2, 3])])
def test_stratified_exits_cover_every_step_of_the_chain_in_each_round(keys: dict[str, Any], choices: list[int]) -> None:
    num_groups = 2 * len(choices)
    objective = make_sgmd(exit_draw="stratified", exit_groups=num_groups, **keys)
    orders = set()
    for step in range(30):
        drawn = exits(objective, num_groups, step)
        for part in (drawn[: len(choices)], drawn[len(choices) :]):
            assert sorted(part) == choices
            orders.add(tuple(part))
    assert len(orders) > 4, "the order is drawn anew"


@pytest.mark.parametrize("exit_draw", ["independent", "stratified"])
def test_exit_index_is_one_per_group_of_units(exit_draw: str) -> None:
    """Units are dealt to ranks round-robin, so one value per group of consecutive units is one for all ranks; and the
    number of micro-batches in a group does not matter."""
    objective = make_sgmd(exit_draw=exit_draw, exit_groups=4)
    seen = set()
    for step in range(40):
        wide = [objective.exit_index(StepState(step, 7, 8, unit), "rollout") for unit in range(8)]
        assert wide[::2] == wide[1::2] == exits(objective, 4, step)
        seen.add((wide[0], wide[2]))
    assert len(seen) > 6, "groups and steps draw for themselves"


@pytest.mark.parametrize(
    "keys, num_exits",
    [
        ({}, 4),
        (DIVERSE, 3),
        ({"diversity": {"weight": {"schedule": "piecewise", "points": [[0, 0.05], [100, 0.0]]}}}, 4),
        ({"student_steps": 1, **DIVERSE}, 1),
    ],
)
def test_stratified_exits_need_a_group_for_each_exit(keys: dict[str, Any], num_exits: int) -> None:
    make_sgmd(exit_draw="stratified", exit_groups=num_exits, **keys)
    make_sgmd(exit_draw="independent", **keys)
    if num_exits > 1:
        with pytest.raises(ValueError, match=f"expected at least {num_exits} groups"):
            make_sgmd(exit_draw="stratified", exit_groups=num_exits - 1, **keys)


def test_exit_draws_of_generator_fake_and_updates_are_independent() -> None:
    objective = make_dmd2()
    streams = [("rollout", 0), ("fake_rollout", 0), ("fake_rollout", 1)]
    draws = [[exits(objective, 1, s, purpose=p, update=u)[0] for s in range(64)] for p, u in streams]
    agree = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in ((draws[0], draws[1]), (draws[1], draws[2]))]
    assert all(4 <= count <= 32 for count in agree), "a quarter of 64 agree by chance"


# -- inner loop -------------------------------------------------------------------------------------------------


def run_step(world: World, objective: Distillation, batches: Sequence[Batch]) -> list[Losses]:
    """All phases of a step, each with its batch."""
    phases = objective.phases(world.state.step)
    return [world.run(phase, batch) for phase, batch in zip(phases, batches, strict=True)]


def assert_renoised(seen: dict[str, Tensor], x_sigma: Tensor, sigma: Tensor) -> None:
    s = sigma.reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(x_sigma, (1 - s) * seen["x_g"].double() + s * seen["noise"].double(), atol=1e-6, rtol=0)


def test_reuse_feeds_the_generators_samples_with_new_levels_and_noise(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make_sgmd(inner_sample="reuse", fake_updates=3)
    generated, inner = spy_samples(objective, monkeypatch)
    run_step(world, objective, [world.batch] * 4)
    assert len(generated) == 1 and generated[0].requires_grad
    assert len(world.generator.x) == objective.exit_index(world.state, "rollout") + 1, "no other rollout"
    for i, seen in enumerate(inner):
        assert torch.equal(seen["x_g"], generated[0]) and not seen["x_g"].requires_grad
        assert_renoised(seen, world.fake.x[i + 1], world.fake.sigma[i + 1])
    assert len({tuple(sigma.tolist()) for sigma in world.fake.sigma}) == 4, (
        "generator phase and each update: own levels"
    )
    noises = [seen["noise"] for seen in inner]
    assert all((noises[0] - other).abs().min() > 0 for other in noises[1:])


def test_reuse_keeps_the_samples_of_each_unit_apart(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make_sgmd(inner_sample="reuse")
    generated, inner = spy_samples(objective, monkeypatch)
    batches = [make_batch(0), make_batch(1)]
    world.state.num_units = 2
    for phase in objective.phases(0):
        for unit in (0, 1):
            world.state.unit_index = unit
            world.run(phase, batches[unit])
    assert all(torch.equal(seen["x_g"], x_g) for seen, x_g in zip(inner, generated, strict=True))
    assert not torch.equal(*generated)


def test_fresh_rolls_out_anew_for_every_update(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make_dmd2(fake_updates=3)
    _, inner = spy_samples(objective, monkeypatch)
    batches = [make_batch(unit) for unit in range(4)]
    run_step(world, objective, batches)
    for update, (seen, batch) in enumerate(zip(inner, batches[1:], strict=True)):
        noise = rng.sample_normal(SHAPE, 7, "fake_rollout", batch.ids, update, device="cpu")
        world.batch = batch
        expected = naive_rollout(world, noise, objective.exit_index(world.state, "fake_rollout", update))
        torch.testing.assert_close(seen["x_g"], expected.detach(), atol=1e-6, rtol=0)
        assert not seen["x_g"].requires_grad
        assert_renoised(seen, world.fake.x[update + 1], world.fake.sigma[update + 1])
    assert not world.state.samples, "nothing is kept that nobody reads"


@pytest.mark.parametrize("inner_sample", ["fresh", "reuse"])
@pytest.mark.parametrize("make, half", [(make_sgmd, 0.5), (make_dmd2, 1.0)])
def test_fake_phase_trains_the_fake_alone(
    world: World, monkeypatch: pytest.MonkeyPatch, make: Any, half: float, inner_sample: str
) -> None:
    objective = make(inner_sample=inner_sample, fake_updates=1)
    _, inner = spy_samples(objective, monkeypatch)
    generator_phase, fake_phase = objective.phases(0)
    world.run(generator_phase)
    losses = world.run(fake_phase)
    losses.per_sample.mean().backward()
    gradients = world.gradients()
    assert gradients["teacher"] is None and gradients["generator"] is None
    fake_gradient = gradients["fake_score"]
    assert fake_gradient is not None and fake_gradient.abs().min() > 0
    seen = inner[0]
    naive = half * mean((seen["velocity"] - (seen["noise"] - seen["x_g"])) ** 2)
    torch.testing.assert_close(losses.per_sample, naive, atol=0, rtol=1e-9)


# -- where samples come from --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase_index", [0, 1])
def test_renoise_rollout_draws_new_noise_between_the_steps(world: World, phase_index: int) -> None:
    objective = make_sgmd(rollout="renoise", student_steps=4, **DIVERSE)
    purpose = ("rollout", "fake_rollout")[phase_index]
    world.run(objective.phases(0)[phase_index])
    counters = () if phase_index == 0 else (0,)
    x = rng.sample_normal(SHAPE, 7, purpose, world.batch.ids, *counters, device="cpu").double()
    exit_index = objective.exit_index(world.state, purpose)
    assert exit_index >= 1 and len(world.generator.x) == exit_index + 1
    for k in range(exit_index):
        torch.testing.assert_close(world.generator.x[k].double(), x, atol=1e-6, rtol=0)
        here, there = STUDENT_SIGMAS[k], STUDENT_SIGMAS[k + 1]
        x0 = x - here * world.generator.bare(x, torch.full((2,), here), world.batch.prompt_embeds).detach()
        noise = rng.sample_normal(SHAPE, 7, f"{purpose}/renoise", world.batch.ids, 0, k, device="cpu")
        x = (1 - there) * x0 + there * noise
    torch.testing.assert_close(world.generator.x[exit_index].double(), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", range(4))
def test_data_rollout_starts_from_noised_latents_and_takes_one_forward(world: World, step: int) -> None:
    objective = make_dmd2(rollout="data")
    world.state.step = step
    losses = world.run(objective.phases(step)[0])
    sigma = STUDENT_SIGMAS[objective.exit_index(world.state, "rollout")]
    noise = rng.sample_normal(SHAPE, 7, "rollout", world.batch.ids, device="cpu")
    assert world.batch.latents is not None
    expected = (1 - sigma) * world.batch.latents + sigma * noise
    assert len(world.generator.x) == 1
    torch.testing.assert_close(world.generator.x[0], expected, atol=1e-6, rtol=0)
    x_g = expected - sigma * world.generator.bare(expected, torch.full((2,), sigma), world.batch.prompt_embeds)
    torch.testing.assert_close(losses.per_sample, naive_generator_loss(world, "dmd2", x_g), atol=0, rtol=1e-5)


@pytest.mark.parametrize("phase_index", [0, 1])
def test_data_rollout_without_latents_is_a_users_mistake(world: World, phase_index: int) -> None:
    captions_only = replace(world.batch, latents=None)
    with pytest.raises(UserError, match=r"objective\.rollout"):
        world.run(make_dmd2(rollout="data").phases(0)[phase_index], captions_only)


def test_other_rollouts_need_no_latents(world: World) -> None:
    captions_only = replace(world.batch, latents=None)
    for phase in make_dmd2(fake_updates=1).phases(0):
        assert world.run(phase, captions_only).per_sample.isfinite().all()
