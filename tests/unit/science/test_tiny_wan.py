"""Scores in the world of the tiny Wan, on videos of the moving shapes in the place of a teacher's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgmd_dist.benchmarks.science.tiny_wan import TinyWan, centred, shape_error
from sgmd_dist.data.world import DIRECTIONS, caption_of
from sgmd_dist.motion import place

NUM_SAMPLES = 64
NUM_REFERENCE = 256


class ShapesInThePlaceOfTheTeacher(TinyWan):
    def teacher_samples(self, count: int, seed: int) -> Tensor:
        speeds = self.world.speeds
        videos = []
        for i, caption in enumerate(self._captions(count)):
            _, colour, shape, _, direction = caption.split()
            x, y = (torch.rand(2, generator=torch.Generator().manual_seed(seed * 10_000 + i)) * 12).tolist()
            speed = speeds[(i // len(self.world.captions()) + seed) % len(speeds)]
            videos.append(self.world.render(shape, colour, direction, speed, x, y))
        return torch.stack(videos)


@pytest.fixture(scope="module")
def world() -> TinyWan:
    return ShapesInThePlaceOfTheTeacher()


@pytest.fixture(scope="module")
def scores_of(world: TinyWan):
    reference = world.teacher_samples(NUM_REFERENCE, 1)
    return lambda samples: world.score(samples, reference)


def test_samples_of_the_teacher_score_as_the_teacher(world: TinyWan, scores_of) -> None:
    scores = scores_of(world.teacher_samples(NUM_SAMPLES, 2))
    assert scores["swd"] < 0.05 and abs(scores["energy_distance"]) < 0.1
    for name in ("motion_ratio", "speed_ratio"):
        assert scores[name] == pytest.approx(1, abs=0.1), name
    assert scores["shape_error"] < 0.02


def test_each_fault_is_seen_by_its_score(world: TinyWan, scores_of) -> None:
    true = world.teacher_samples(NUM_SAMPLES, 2)
    still = true[:, :, :1].expand_as(true)
    others = true.roll(1, 0)  # of another prompt
    assert scores_of(still)["speed_ratio"] < 0.01 and scores_of(still)["motion_ratio"] == 0
    assert scores_of(1.3 * true)["swd"] > 0.1 and scores_of(0.7 * true)["swd"] > 0.1
    assert scores_of(1.3 * true)["energy_distance"] > 0.1
    assert scores_of(others)["shape_error"] > 0.1


def test_a_video_is_centred_wherever_it_is(world: TinyWan) -> None:
    video = world.world.render("ball", "red", "right", 0.5, 3.0, 7.0)[None]
    everywhere = torch.cat([video.roll((y, x), (3, 4)) for y in range(0, 12, 3) for x in range(0, 12, 5)])
    assert torch.equal(centred(everywhere), centred(video).expand_as(everywhere))
    assert place(centred(video)[:, :, 0]).abs().max() < 0.5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_shape_error_of_the_worlds_own_videos_is_small(world: TinyWan, direction: str) -> None:
    for shape in world.world.shapes:
        for colour in world.world.colours:
            video = world.world.render(shape, colour, direction, 0.5, 2.3, 8.1)[None]
            assert shape_error(video, [caption_of(shape, colour, direction)]) < 0.02
