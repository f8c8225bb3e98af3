"""The world of points on a ring: what its samples are, and what its scores tell."""

from __future__ import annotations

import pytest
import torch
from starts import untrained_samples
from torch import Tensor

from sgmd_dist.benchmarks.science import base, ring, scores
from sgmd_dist.benchmarks.science.exact import MixtureWorld

COUNT = 2048


@pytest.fixture(scope="module")
def world() -> MixtureWorld:
    return ring.build()


def shares(world: MixtureWorld, latents: Tensor) -> list[Tensor]:
    """For every prompt the shares of its own modes, around the ring."""
    found = []
    for weights, points in zip(world.mixture.weights, world.by_prompt(latents.flatten(1)), strict=True):
        modes, _ = scores.nearest_modes(points, world.mixture.means[weights > 0], world.mixture.covariance)
        found.append(torch.bincount(modes, minlength=int((weights > 0).sum())) / len(points))
    return found


def test_it_is_a_world(world: MixtureWorld) -> None:
    as_world: base.World = world
    assert as_world.name == "ring" and as_world.latent_shape == (2, 1, 1, 1)
    embeds, negative = as_world.prompts(2 * ring.NUM_CLASSES)
    assert embeds.argmax(2)[:, 0].tolist() == [*range(ring.NUM_CLASSES)] * 2
    assert negative.shape == (1, 1, ring.NUM_CLASSES)


def test_modes_are_apart_and_prompts_share_them_out(world: MixtureWorld) -> None:
    means = world.mixture.means
    assert torch.pdist(means).min() > 5 * ring.STD
    assert means.norm(dim=1).tolist() == pytest.approx([ring.RADIUS] * ring.NUM_MODES)
    assert ((world.mixture.weights > 0).sum(0) == 1).all(), "every mode belongs to one prompt"
    assert world.mixture.weights.sum(1).tolist() == pytest.approx([1.0] * ring.NUM_CLASSES)


def test_real_points_lie_in_the_prompts_modes_equally_often(world: MixtureWorld) -> None:
    latents = torch.cat([latents for unit in range(30) if (latents := world.batch(unit).latents) is not None])
    per_class = ring.NUM_MODES // ring.NUM_CLASSES
    for share in shares(world, latents):
        torch.testing.assert_close(share, torch.full((per_class,), 1 / per_class), atol=0.06, rtol=0)
    assert latents.flatten(1).norm(dim=1).mean().item() == pytest.approx(ring.RADIUS, abs=0.03)


def test_guidance_prefers_inner_modes_and_loses_none(world: MixtureWorld) -> None:
    for share in shares(world, world.teacher_samples(COUNT, 0)):
        assert share.min() > 0.03
        assert share[1:-1].min() > 1.5 * share[[0, -1]].max()


def test_the_start_of_training_is_far_from_the_teacher(world: MixtureWorld) -> None:
    """Four steps of the teacher without guidance end between the modes."""
    reference, own = world.teacher_samples(COUNT, 0), world.teacher_samples(COUNT, 1)
    before, best = world.score(untrained_samples(world, COUNT), reference), world.score(own, reference)
    assert before["swd"] > 3 * best["swd"] and before["energy_distance"] > 10 * abs(best["energy_distance"])
    assert before["precision"] < 0.95 and best["precision"] > 0.97 and best["mode_coverage"] == 1


def test_a_lost_mode_is_seen(world: MixtureWorld) -> None:
    reference = world.teacher_samples(COUNT, 0)
    means = world.mixture.means
    collapsed = means[(world.mixture.weights > 0).double().argmax(1)][torch.arange(COUNT) % ring.NUM_CLASSES]
    score = world.score(collapsed.reshape(reference.shape), reference)
    assert score["mode_coverage"] == pytest.approx(ring.NUM_CLASSES / ring.NUM_MODES)
    assert score["precision"] == 1 and score["swd"] > 0.3
