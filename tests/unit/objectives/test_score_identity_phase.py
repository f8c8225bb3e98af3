"""The generator phase of SiD and SIM against the method written out: gradients through both networks' inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from distillation_world import (
    World,
    assert_generator_phase_is_written_out,
    make_batch,
    make_dmd2,
    make_sid,
    make_sim,
)

from sgmd_dist.objectives._distillation import Distillation

# `naive_generator_loss` is written for these.
MAKE: dict[str, Callable[..., Distillation]] = {
    "sid": lambda **keys: make_sid(**{"alpha": 1.2, **keys}),
    "sim": lambda **keys: make_sim(**{"huber_c": 0.3, **keys}),
}


@pytest.fixture
def world() -> World:
    """With teacher and fake score frozen, as Roles does it."""
    world = World()
    for network in (world.teacher, world.fake):
        network.requires_grad_(False)
    return world


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("step", range(4))
def test_generator_phase_is_the_method_written_out(world: World, name: str, step: int) -> None:
    objective = MAKE[name]()
    assert_generator_phase_is_written_out(world, objective, name, step)


@pytest.mark.parametrize("name", MAKE)
def test_the_gradient_goes_through_both_inputs_and_into_no_weights_but_the_generators(world: World, name: str) -> None:
    losses = world.run(MAKE[name]().phases(0)[0])
    assert world.teacher.graph == [True] and world.fake.graph == [True]
    losses.per_sample.mean().backward()
    gradients = world.gradients()
    assert gradients["teacher"] is None and gradients["fake_score"] is None
    assert gradients["generator"] is not None and gradients["generator"].abs().min() > 0


@pytest.mark.parametrize("name", MAKE)
def test_each_of_the_three_ways_to_the_generator_counts(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cutting the graph at the teacher's input, or at the fake score's, changes the gradient and not the loss."""
    results = []
    for cut in (None, "teacher", "fake_score"):
        network = world.roles[cut] if cut else None
        if network is not None:
            bare = type(network).bare
            monkeypatch.setattr(network, "bare", lambda x, *rest, net=network, run=bare: run(net, x.detach(), *rest))
        losses = world.run(MAKE[name]().phases(0)[0])
        results.append(
            (losses.per_sample.detach(), torch.autograd.grad(losses.per_sample.mean(), world.generator.weight)[0])
        )
        monkeypatch.undo()
    whole, *others = results
    for loss, gradient in others:
        assert torch.equal(loss, whole[0])
        assert (gradient - whole[1]).norm() > 0.01 * whole[1].norm()


@pytest.mark.parametrize("name", MAKE)
def test_batched_and_separate_guidance_agree(world: World, name: str) -> None:
    results = []
    for guidance in ("batched", "separate"):
        losses = world.run(MAKE[name](guidance=guidance).phases(0)[0])
        results.append((losses.per_sample, torch.autograd.grad(losses.per_sample.mean(), world.generator.weight)[0]))
    assert [len(x) for x in world.teacher.x] == [4, 2, 2] and all(world.teacher.graph)
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_guidance_of_one_runs_the_teacher_once_on_the_prompt(world: World, name: str) -> None:
    losses = world.run(MAKE[name](guidance_scale=1.0).phases(0)[0])
    assert [len(x) for x in world.teacher.x] == [2] and world.teacher.text[0] is world.batch.prompt_embeds
    unused = replace(world.batch, negative_embeds=torch.full_like(world.batch.negative_embeds, torch.nan))
    again = world.run(MAKE[name](guidance_scale=1.0).phases(0)[0], unused)
    torch.testing.assert_close(again.per_sample, losses.per_sample)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    "keys, teacher",
    [({}, (1, 2)), ({"guidance": "separate"}, (2, 1)), ({"guidance_scale": 1.0}, (1, 1))],
)
def test_the_declared_passes_of_the_scores_are_through_their_inputs(
    name: str, keys: dict[str, Any], teacher: tuple[int, int]
) -> None:
    """Evaluations of the teacher and the samples in each per sample of the micro-batch; its graph is never missing."""
    generator_phase, fake_phase = MAKE[name](**keys).phases(0)
    assert [passes.gradient for passes in generator_phase.passes] == ["none", "weights", "input", "input"]
    last = generator_phase.passes[-1]
    assert (last.role, last.mean, last.most, last.batch) == ("teacher", teacher[0], teacher[0], teacher[1])
    assert {passes.role for passes in fake_phase.passes} == {"generator", "fake_score"}


@pytest.mark.parametrize("name", MAKE)
def test_the_fake_score_trains_as_dmd2s(world: World, name: str) -> None:
    """The same loss on the same draws, once per generator update."""
    phases = MAKE[name]().phases(0)
    assert [phase.role for phase in phases] == ["generator", "fake_score"]
    ours = world.run(phases[1])
    theirs = world.run(make_dmd2(fake_updates=1).phases(0)[1])
    assert torch.equal(ours.per_sample, theirs.per_sample)


@pytest.mark.parametrize("name", MAKE)
def test_metrics_are_per_sample_without_graphs(world: World, name: str) -> None:
    batch = make_batch(unit=2, size=3)
    metrics = {k: v for phase in MAKE[name]().phases(0) for k, v in world.run(phase, batch).metrics.items()}
    expected = {"generator/fisher", "generator/score_identity", "generator/latent_motion", "fake_score/residual"}
    assert expected <= set(metrics)
    assert all(m.shape == (3,) and not m.requires_grad and bool(m.isfinite().all()) for m in metrics.values())


def test_metrics_are_the_parts_of_the_loss(world: World) -> None:
    for alpha in (0.5, 1.0, 1.2):
        losses = world.run(make_sid(alpha=alpha).phases(0)[0])
        parts = 2 * (1 - alpha) * losses.metrics["generator/fisher"] + losses.metrics["generator/score_identity"]
        torch.testing.assert_close(losses.per_sample.detach(), parts)
    losses = world.run(make_sim(huber_c=0.3).phases(0)[0])
    parts = losses.metrics["generator/huber_shrinkage"] * losses.metrics["generator/score_identity"]
    torch.testing.assert_close(losses.per_sample.detach(), parts)


@pytest.mark.parametrize("make, key, values", [(make_sid, "alpha", (0.0, 1.2)), (make_sim, "huber_c", (0.02, 1.0))])
def test_the_key_may_be_scheduled(world: World, make: Any, key: str, values: tuple[float, float]) -> None:
    world.state.step = 2
    ramp = {"schedule": "linear", "from": values[0], "to": values[1], "steps": 4}
    settings = (ramp, (values[0] + values[1]) / 2, values[0])
    results = [world.run(make(**{key: value}).phases(2)[0]).per_sample for value in settings]
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[0], results[2], rtol=1e-3), "at its beginning the number was another"


@pytest.mark.parametrize("make, key, wrong", [(make_sid, "alpha", -0.1), (make_sim, "huber_c", 0.0)])
def test_a_constant_out_of_range_is_refused(make: Any, key: str, wrong: float) -> None:
    with pytest.raises(ValueError, match="expected a number >"):
        make(**{key: wrong})
