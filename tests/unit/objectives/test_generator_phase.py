"""The generator phase against the method written out, its guidance and its diversity term; and flow matching."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from distillation_world import (
    DIVERSE,
    SHAPE,
    World,
    assert_generator_phase_is_written_out,
    exits,
    make_batch,
    make_dmd2,
    make_sgmd,
    mean,
)

from sgmd_dist import rng
from sgmd_dist.errors import UserError
from sgmd_dist.objectives import flow_matching


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("name", ["sgmd", "dmd2"])
@pytest.mark.parametrize("step", range(4))
def test_generator_phase_is_the_method_written_out(world: World, name: str, step: int) -> None:
    objective = make_sgmd(fisher_weight=0.7) if name == "sgmd" else make_dmd2()
    assert_generator_phase_is_written_out(world, objective, name, step)


def test_the_fused_loss_is_the_same_with_its_gradient_and_metrics(world: World) -> None:
    plain, fused = (world.run(make_sgmd(fisher_weight=0.7).phases(0)[0]) for world.state.fused in (False, True))
    assert plain.metrics.keys() == fused.metrics.keys()
    torch.testing.assert_close(dict(fused.metrics), dict(plain.metrics), atol=0, rtol=1e-12)
    torch.testing.assert_close(fused.per_sample, plain.per_sample, atol=0, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(loss.per_sample.mean(), world.generator.weight)[0] for loss in (fused, plain))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-10)


def test_the_four_steps_of_that_test_have_different_exits() -> None:
    assert len({exits(make_sgmd(), 1, step)[0] for step in range(4)}) > 1


@pytest.mark.parametrize("name", ["sgmd", "dmd2"])
def test_generator_phase_sends_no_gradient_to_the_teacher(world: World, name: str) -> None:
    """Even if the teacher's weights took gradients. With the fake frozen, as Roles does it, only the generator's do."""
    world.fake.requires_grad_(False)
    objective = make_sgmd(**DIVERSE) if name == "sgmd" else make_dmd2()
    world.run(objective.phases(0)[0]).per_sample.mean().backward()
    gradients = world.gradients()
    assert gradients["teacher"] is None and gradients["fake_score"] is None
    assert gradients["generator"] is not None and gradients["generator"].abs().min() > 0
    assert not any(world.teacher.graph)
    assert world.fake.graph == [name == "sgmd"], "SGMD goes back through the fake's input, DMD2 does not"


def test_fake_sees_the_positive_prompt_only(world: World) -> None:
    for phase in make_sgmd().phases(0):
        world.run(phase)
    for text in [*world.fake.text, *world.generator.text]:
        assert text is world.batch.prompt_embeds


def test_weights_of_the_loss_follow_their_schedules(world: World) -> None:
    ramp = {"schedule": "linear", "from": 0.0, "to": 1.0, "steps": 4}
    for step in (0, 2, 4):
        world.state.step = step
        plain, scheduled = make_sgmd(), make_sgmd(fisher_weight=ramp, nr_weight=ramp, rc_weight=ramp)
        metrics = world.run(plain.phases(step)[0]).metrics
        expected = step / 4 * (metrics["generator/fisher"] - metrics["generator/nr"])
        torch.testing.assert_close(world.run(scheduled.phases(step)[0]).per_sample, expected, rtol=1e-9, atol=0)
        inner = [world.run(objective.phases(step)[1]).per_sample for objective in (plain, scheduled)]
        torch.testing.assert_close(inner[1], step / 4 * inner[0])


@pytest.mark.parametrize(
    "name, from_, to",
    [("guidance_scale", 1.0, 5.0), ("sigma_min", 0.97, 0.03), ("sigma_max", 0.98, 0.3), ("nr_weight", 0.0, 0.4)],
)
def test_a_scheduled_number_acts_as_the_constant_that_it_is_at_that_step(
    world: World, name: str, from_: float, to: float
) -> None:
    world.state.step = 2
    ramp = {"schedule": "linear", "from": from_, "to": to, "steps": 4}
    results = [
        [world.run(phase).per_sample for phase in make_sgmd(**{name: value}).phases(2)]
        for value in (ramp, (from_ + to) / 2, from_)
    ]
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[0][0], results[2][0]), "at its beginning the number was another"


def test_metrics_are_per_sample_without_graphs(world: World) -> None:
    objective = make_sgmd(**DIVERSE)
    metrics = {k: v for phase in objective.phases(0) for k, v in world.run(phase).metrics.items()}
    assert {"generator/alpha", "generator/latent_motion", "generator/diversity", "fake_score/residual"} <= set(metrics)
    shape = (world.batch.size,)
    assert all(m.shape == shape and not m.requires_grad and bool(m.isfinite().all()) for m in metrics.values())


def test_alpha_is_the_share_of_nr_beside_a_weighted_fisher_term(world: World) -> None:
    """The losses' gradient vanishes where f_F = (f_T - alpha x_g) / (1 - alpha): both weights set alpha."""

    def metrics(**keys: Any) -> dict[str, torch.Tensor]:
        return world.run(make_sgmd(**keys).phases(0)[0]).metrics

    single, double = metrics(), metrics(fisher_weight=2.0)
    torch.testing.assert_close(double["generator/alpha"], single["generator/alpha"] / 2)
    assert "generator/alpha" not in metrics(fisher_weight=0.0), "a share of nothing"


# -- guidance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [make_sgmd, make_dmd2])
def test_batched_and_separate_guidance_agree(world: World, objective: Any) -> None:
    results = []
    for guidance in ("batched", "separate"):
        world.generator.weight.grad = None
        losses = world.run(objective(guidance=guidance).phases(0)[0])
        losses.per_sample.mean().backward()
        results.append((losses.per_sample.detach(), world.generator.weight.grad))
    assert [len(x) for x in world.teacher.x] == [4, 2, 2]
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=1e-6)


def test_guidance_of_one_runs_the_teacher_once_on_the_prompt(world: World) -> None:
    losses = world.run(make_sgmd(guidance_scale=1.0).phases(0)[0])
    assert [len(x) for x in world.teacher.x] == [2] and world.teacher.text[0] is world.batch.prompt_embeds
    unused = replace(world.batch, negative_embeds=torch.full_like(world.batch.negative_embeds, torch.nan))
    torch.testing.assert_close(
        world.run(make_sgmd(guidance_scale=1.0).phases(0)[0], unused).per_sample, losses.per_sample
    )


# -- diversity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, total_steps", [(5, 30), (1, 2), (3, 3)])
def test_diversity_pulls_the_first_step_to_where_the_teacher_goes(world: World, steps: int, total_steps: int) -> None:
    keys = {"weight": 0.25, "steps": steps, "total_steps": total_steps}
    objective = make_sgmd(diversity=keys)
    noise = rng.sample_normal(SHAPE, 7, "rollout", world.batch.ids, device="cpu")
    extra = objective.extra_generator_loss(world.roles, world.batch, world.state, noise)
    assert extra is not None
    x, text, negative = noise, world.batch.prompt_embeds, world.batch.negative_embeds.expand(2, -1, -1)
    grid = [1 - i / total_steps for i in range(total_steps + 1)]
    sigmas = [5 * t / (1 + 4 * t) for t in grid]
    for here, there in pairwise(sigmas[: steps + 1]):
        s = torch.full((2,), here)
        plus, minus = world.teacher.bare(x, s, text), world.teacher.bare(x, s, negative)
        x = x + (there - here) * (minus + 3.0 * (plus - minus))
    target = ((noise - x) / (1 - sigmas[steps])).detach()
    first = world.generator.bare(noise, torch.ones(2), text)
    torch.testing.assert_close(extra.per_sample, mean((first - target) ** 2), atol=0, rtol=1e-5)
    assert extra.weight == 0.25
    assert len(world.teacher.x) == steps and not any(world.teacher.graph)


def test_diversity_is_added_to_the_loss_and_costs_no_generator_forward(world: World) -> None:
    world.fake.requires_grad_(False)
    gradients = []
    for weight in (0.0, 1.0):
        objective = make_sgmd(diversity={"weight": weight})
        objective.min_exit = lambda step: 1  # type: ignore[method-assign]  # the same exit with and without
        world.generator.x.clear()
        losses = world.run(objective.phases(0)[0])
        assert len(world.generator.x) == objective.exit_index(world.state, "rollout") + 1
        gradients.append(torch.autograd.grad(losses.per_sample.mean(), world.generator.weight)[0])
    extra = objective.extra_generator_loss(world.roles, world.batch, world.state, world.generator.x[0].float())
    assert extra is not None
    pull = torch.autograd.grad(extra.per_sample.mean(), world.generator.weight)[0]
    torch.testing.assert_close(gradients[1] - gradients[0], pull, atol=1e-9, rtol=1e-6)


def test_the_diversity_metric_is_the_loss_without_its_weight(world: World) -> None:
    weights = (0.05, 0.5)
    metrics = [world.run(make_sgmd(diversity={"weight": weight}).phases(0)[0]).metrics for weight in weights]
    assert torch.equal(metrics[0]["generator/diversity"], metrics[1]["generator/diversity"])
    assert bool((metrics[0]["generator/diversity"] > 0).all())


# -- flow matching ----------------------------------------------------------------------------------------------


def make_flow_matching(**keys: Any) -> flow_matching.FlowMatching:
    return flow_matching.build(flow_matching.Section.model_validate({"name": "flow_matching", **keys}))


def test_flow_matching_regresses_the_velocity_of_real_latents(world: World) -> None:
    [phase] = make_flow_matching(sigma_shift=3.0, caption_dropout=0.0).phases(0)
    losses = world.run(phase)
    ids, latents = world.batch.ids, world.batch.latents
    assert phase.role == "generator" and latents is not None
    u = rng.sample_uniform(7, "flow/sigma", ids, device="cpu").float()
    sigma = 3 * u / (1 + 2 * u)
    noise, s = rng.sample_normal(SHAPE, 7, "flow/noise", ids, device="cpu"), sigma.reshape(-1, 1, 1, 1, 1)
    velocity = world.generator.bare((1 - s) * latents + s * noise, sigma, world.batch.prompt_embeds)
    torch.testing.assert_close(losses.per_sample, mean((velocity - (noise - latents)) ** 2), atol=0, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_caption_dropout_shows_the_negative_prompt_instead(world: World, dropout: float) -> None:
    [phase] = make_flow_matching(caption_dropout=dropout).phases(0)
    batch = make_batch(unit=3, size=400)
    world.run(phase, batch)
    [text] = world.generator.text
    dropped = (text == batch.negative_embeds).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(dropout, abs=0.06)
    assert torch.equal(text[~dropped], batch.prompt_embeds[~dropped])


def test_flow_matching_without_latents_is_a_users_mistake(world: World) -> None:
    [phase] = make_flow_matching().phases(0)
    with pytest.raises(UserError, match=r"data\.shards.*latents"):
        world.run(phase, replace(world.batch, latents=None))
