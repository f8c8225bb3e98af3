"""The world of trajectories: what its samples are, and what its scores tell."""

from __future__ import annotations

import pytest
import torch
from starts import untrained_samples
from torch import Tensor

from sgmd_dist.benchmarks.science import base, scores, trajectories

COUNT = 2048


@pytest.fixture(scope="module")
def world() -> trajectories.Trajectories:
    return trajectories.build()


def tracks(latents: Tensor) -> Tensor:
    """`[N, F, 2]`."""
    return latents[..., 0, 0].transpose(1, 2)


def speeds_of(latents: Tensor) -> Tensor:
    return scores.slope(tracks(latents)).norm(dim=1)


def test_it_is_a_world(world: trajectories.Trajectories) -> None:
    as_world: base.World = world
    assert as_world.name == "trajectories" and as_world.latent_shape == (2, 8, 1, 1)
    embeds, negative = as_world.prompts(8)
    assert embeds.argmax(2)[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3] and negative.shape == (1, 1, 4)


def test_real_tracks_go_at_three_speeds_along_the_prompts_direction(world: trajectories.Trajectories) -> None:
    latents = torch.cat([latents for unit in range(40) if (latents := world.batch(unit).latents) is not None])
    velocities = scores.slope(tracks(latents))
    nearest = (velocities.norm(dim=1)[:, None] - torch.tensor(trajectories.SPEEDS)).abs().min(dim=1)
    assert nearest.values.max() < 0.1, "noise alone changes a speed"
    shares = torch.bincount(nearest.indices, minlength=3) / len(latents)
    torch.testing.assert_close(shares, torch.tensor(trajectories.SPEED_WEIGHTS), atol=0.04, rtol=0)
    right, down, left, up = (world.by_prompt(velocities)[k].mean(0) for k in range(4))
    assert right[0] > 0.2 and left[0] < -0.2 and down[1] > 0.2 and up[1] < -0.2
    centres = tracks(latents).mean(1)
    assert centres.mean(0).abs().max() < 0.05
    assert centres.std().item() == pytest.approx(trajectories.START_STD, rel=0.05)
    wobble = scores.jitter(tracks(latents)) / 6**0.5
    assert wobble == pytest.approx(trajectories.NOISE_STD, rel=0.05)


def test_guidance_makes_tracks_faster_and_loses_no_mode(world: trajectories.Trajectories) -> None:
    guided_speeds = speeds_of(world.teacher_samples(COUNT, 0))
    unguided = sum(
        speed * weight for speed, weight in zip(trajectories.SPEEDS, trajectories.SPEED_WEIGHTS, strict=True)
    )
    assert guided_speeds.mean() > 1.2 * unguided
    nearest = (guided_speeds[:, None] - torch.tensor(trajectories.SPEEDS)).abs().argmin(dim=1)
    assert (torch.bincount(nearest, minlength=3) / COUNT).min() > 0.05


def test_the_start_of_training_is_far_from_the_teacher(world: trajectories.Trajectories) -> None:
    """Four steps of the teacher without guidance: slow, and smoother than real tracks."""
    reference, own = world.teacher_samples(COUNT, 0), world.teacher_samples(COUNT, 1)
    before, best = world.score(untrained_samples(world, COUNT), reference), world.score(own, reference)
    assert before["swd"] > 4 * best["swd"]
    assert before["speed_ratio"] < 0.8 and before["fast_ratio"] < 0.5 and before["jitter_ratio"] < 0.5
    assert before["speed_distance"] > 5 * best["speed_distance"]
    assert best["mode_coverage"] == 1 and best["precision"] > 0.98
    for name in ("speed_ratio", "fast_ratio", "jitter_ratio"):
        assert best[name] == pytest.approx(1, abs=0.06), name


def test_a_generator_that_stands_still_is_caught(world: trajectories.Trajectories) -> None:
    reference = world.teacher_samples(COUNT, 0)
    still = reference.mean(2, keepdim=True).expand_as(reference)
    score = world.score(still, reference)
    assert score["speed_ratio"] == pytest.approx(0, abs=1e-6) and score["fast_ratio"] == 0
    assert score["mode_coverage"] == 0 and score["jitter_ratio"] == pytest.approx(0, abs=1e-6)
    assert score["swd"] > 0.3


def test_one_speed_for_all_is_caught(world: trajectories.Trajectories) -> None:
    """The right mean speed without its distribution."""
    reference = world.teacher_samples(COUNT, 0)
    own = world.teacher_samples(COUNT, 1)
    factor = speeds_of(reference).mean() / speeds_of(own)
    centre = own.mean(2, keepdim=True)
    uniform = centre + (own - centre) * factor[:, None, None, None, None]
    score = world.score(uniform, reference)
    assert score["speed_ratio"] == pytest.approx(1, abs=0.02)
    assert score["speed_distance"] > 0.05 and score["mode_coverage"] < 0.7
