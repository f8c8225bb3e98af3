"""The moving-shapes world: a known distribution, written as real shards."""

from __future__ import annotations

import json
import tarfile
from collections import Counter

import pytest
import torch
from safetensors.torch import load, load_file

from sgmd_dist.data.encode import TextEncoder, make_tiny_text_encoder
from sgmd_dist.data.world import AMPLITUDE, DIRECTIONS, SHAPES, World, latents_to_rgb, write_world_shards
from sgmd_dist.errors import UserError


@pytest.fixture(scope="module")
def samples():
    return [World().sample(seed=3, index=i) for i in range(2000)]


def test_a_video_is_a_function_of_seed_and_index():
    world = World()
    again = world.sample(1, 7)
    assert torch.equal(world.sample(1, 7).latents, again.latents)
    assert not torch.equal(world.sample(1, 8).latents, again.latents)
    assert not torch.equal(world.sample(2, 7).latents, again.latents)


def test_latents_have_the_declared_shape_and_roughly_unit_scale_around_zero(samples):
    latents = torch.stack([sample.latents for sample in samples[:500]])
    assert latents.shape[1:] == World().latent_shape == (3, 8, 12, 12)
    assert latents.dtype == torch.float32
    assert 0.9 < latents.std() < 1.1
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 0.05


def test_the_caption_names_everything_but_the_speed(samples):
    for sample in samples[:50]:
        assert sample.caption == f"a {sample.colour} {sample.shape} moving {sample.direction}"
    assert {sample.caption for sample in samples} == set(World().captions())
    assert len(World().captions()) == len(set(World().captions())) == 2 * 4 * 4


def test_attributes_are_uniform_and_independent_of_the_speed(samples):
    speeds = Counter(sample.speed for sample in samples)
    assert all(abs(speeds[speed] / len(samples) - 1 / 3) < 0.05 for speed in World().speeds)
    for direction in DIRECTIONS:
        own = [sample.speed for sample in samples if sample.direction == direction]
        assert abs(len(own) / len(samples) - 1 / 4) < 0.05
        assert abs(sum(own) / len(own) - World().mean_speed) < 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_whole_pixel_move_is_a_roll_of_the_first_frame_on_the_torus(shape, direction):
    video = World().render(shape, "red", direction, speed=2.0, start_x=10.3, start_y=5.6)
    x, y = DIRECTIONS[direction]
    for frame in range(8):
        expected = video[:, 0].roll((2 * frame * y, 2 * frame * x), dims=(1, 2))
        assert torch.allclose(video[:, frame], expected, atol=1e-5)


def test_shapes_and_colours_can_be_told_apart():
    world = World()
    pictures = [world.render(s, c, "up", 1.0, 6, 6).flatten() for s in world.shapes for c in world.colours]
    distances = torch.cdist(torch.stack(pictures), torch.stack(pictures)) / torch.stack(pictures).norm(dim=1).mean()
    assert distances.fill_diagonal_(1.0).min() > 0.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shapes": ("ball", "star")}, "star"),
        ({"colours": ()}, "colours"),
        ({"directions": ("north",)}, "north"),
        ({"speeds": (0.5, 6.0)}, r"\[0, 6\)"),
        ({"channels": 4}, "channels=4"),
        ({"num_frames": 1}, "num_frames=1"),
    ],
)
def test_an_impossible_world_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        World(**fields)


def test_pictures_are_grey_where_nothing_is_and_show_every_pixel_enlarged():
    latents = torch.zeros(3, 2, 4, 6)
    latents[0, 1, 0, 5] = AMPLITUDE
    rgb = latents_to_rgb(latents, scale=3)
    assert rgb.shape == (2, 12, 18, 3)
    assert rgb.dtype == torch.uint8
    assert (rgb[0] == 128).all()
    assert (rgb[1, :3, 15:, 0] == 255).all()
    assert (rgb[1, :3, 15:, 1:] == 128).all()


def test_shards_hold_the_worlds_samples_in_order_with_embeddings_and_attributes(tmp_path):
    world = World()
    make_tiny_text_encoder(tmp_path / "tiny", world.captions())
    encoder = TextEncoder.from_pretrained(tmp_path / "tiny")
    folder = tmp_path / "shards"
    write_world_shards(folder, world, encoder, num_samples=10, seed=5, samples_per_shard=4)

    members: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    keys = sorted({name.split(".")[0] for name in members})
    assert len(list(folder.glob("*.tar"))) == 3
    assert len(keys) == 10
    for index, key in enumerate(keys):
        expected = world.sample(5, index)
        fields = json.loads(members[f"{key}.json"])
        tensors = load(members[f"{key}.sample.safetensors"])
        assert fields["caption"] == expected.caption
        assert fields["source"] == "world:moving_shapes"
        assert (fields["shape"], fields["speed"]) == (expected.shape, expected.speed)
        assert torch.equal(tensors["latents"], expected.latents.bfloat16())
        # Another batch may round otherwise: one unit of bf16's last place.
        alone = encoder.encode([expected.caption])[0].bfloat16()
        torch.testing.assert_close(tensors["prompt_embeds"], alone, rtol=2**-7, atol=1e-6)
    negative = load_file(folder / "negative_prompt.safetensors")["prompt_embeds"]
    assert torch.equal(negative, encoder.encode([""])[0].bfloat16())
    assert (folder / "index.json").is_file()
