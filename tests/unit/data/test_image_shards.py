"""Shards for image to video: the condition is the diffusers pipeline's own, and comes with its sample in the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel

from sgmd_dist.assemble import build_model
from sgmd_dist.conditions import TextAndImage
from sgmd_dist.data.examine import build_index
from sgmd_dist.data.format import write_negative_prompt
from sgmd_dist.data.index import ShardIndex, consolidate
from sgmd_dist.data.manifest import read_videos
from sgmd_dist.data.preparation import Sample, Skipped, prepare
from sgmd_dist.data.record import ShardRecord, sidecar_path
from sgmd_dist.data.row_encoders import VideoRows, image_settings, transformer_latents
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.data.sources import check_sources
from sgmd_dist.data.stream import Stream
from sgmd_dist.data.verify import verify
from sgmd_dist.data.video import parse_buckets, probe, read_clip
from sgmd_dist.errors import UserError
from sgmd_dist.models._wan_image import network_inputs
from sgmd_dist.models.wan import Section, build
from sgmd_dist.pairs import Chain, make_pairs
from sgmd_dist.recipe import Recipe

FPS = Fraction(16)
BUCKETS = parse_buckets("9x32x48")
SHAPE = (4, 2, 3, 6)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, clips: Callable[..., None]) -> Path:
    """Two videos with captions."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        clips(folder / f"{number}.mp4", 12 + number, height=32, width=48)
        (folder / f"{number}.txt").write_text("a red ball moving left")
    return folder


def encoded(folder: Path, pipeline: Path) -> VideoRows:
    return VideoRows.load(read_videos(folder), pipeline, BUCKETS, frames_per_second=FPS)


# Preparation


def test_the_condition_is_what_the_diffusers_pipeline_prepares(folder: Path, image_pipeline: Path) -> None:
    pipe: Any = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        scheduler=None,
        vae=AutoencoderKLWan.from_pretrained(image_pipeline / "vae"),
        image_encoder=CLIPVisionModel.from_pretrained(image_pipeline / "image_encoder"),
        image_processor=CLIPImageProcessor.from_pretrained(image_pipeline / "image_processor"),
    )
    manifest = read_videos(folder)
    model = build(Section(family="wan", compute_dtype="float32"), str(image_pipeline), "model.pretrained")
    for row, sample in encoded(folder, image_pipeline).encode(manifest.rows):
        assert isinstance(sample, Sample)
        assert sample.condition_latents is not None and sample.image_embeds is not None
        path = manifest.path(row)
        first = Image.fromarray(read_clip(path, probe(path, Fraction(9, 16)), FPS, BUCKETS[0])[0].numpy())
        image = pipe.video_processor.preprocess(first, height=32, width=48)
        _, expected = pipe.prepare_latents(image, 1, 3, 32, 48, 9, torch.float32, torch.device("cpu"))
        given = TextAndImage(torch.zeros(1, 2, 32), sample.condition_latents[None], sample.image_embeds[None])
        seen = network_inputs(model.image_input, torch.zeros(1, *sample.latent_shape), given)
        torch.testing.assert_close(seen["hidden_states"][:, 3:], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample.image_embeds[None], pipe.encode_image(first))


def test_prepared_shards_are_whole_and_fit_their_model(
    folder: Path, image_pipeline: Path, tmp_path: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    out = tmp_path / "out"
    prepare(out, read_videos(folder).rows, {}, encoded(folder, image_pipeline), shard_bytes=10**9)
    assert verify([str(out)]).mistakes == []
    index = ShardIndex.open(out)
    assert index.held(0).condition and index.held(0).image_embeds == (5, 10) and index.has_latents(0)
    recipe = tiny_recipe(f"model.pretrained={image_pipeline}", "model.config=null", f"data.shards={out}")
    check_sources(recipe, build_model(recipe, "generator"))


def test_a_text_to_video_folder_makes_the_samples_that_it_made(folder: Path, video_pipeline: Path) -> None:
    assert image_settings(video_pipeline) == {}
    for _, sample in encoded(folder, video_pipeline).encode(read_videos(folder).rows):
        assert isinstance(sample, Sample) and sample.condition_latents is None and sample.image_embeds is None


def test_a_folder_without_its_image_encoder_is_refused(folder: Path, image_pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(image_pipeline, tmp_path / "copy", ignore=shutil.ignore_patterns("image_processor"))
    assert image_settings(tmp_path / "copy") != image_settings(image_pipeline)
    with pytest.raises(UserError, match=r"image_processor: no such folder, and the model's images need it"):
        encoded(folder, tmp_path / "copy")


def test_an_image_that_is_not_finite_is_a_reason(
    folder: Path, image_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As latents that are not: the videos after it are prepared."""
    encoder = encoded(folder, image_pipeline)
    monkeypatch.setattr(encoder._image_encoder, "encode", lambda picture: torch.full((3, 4), torch.nan))
    results = [result for _, result in encoder.encode(read_videos(folder).rows)]
    assert results == [Skipped("its image_embeds are not finite")] * len(results)


# The format


def image_of(number: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    latents, embeds = torch.randn(SHAPE, generator=draw), torch.randn(5, 10, generator=draw)
    return {"condition_latents": latents.bfloat16(), "image_embeds": embeds.bfloat16()}


@pytest.fixture
def images(tmp_path: Path, samples: SimpleNamespace) -> ShardIndex:
    """7 captions with images in 2 shards."""
    with ShardWriter(tmp_path / "images", latent_shape=SHAPE, bucket="images", samples_per_shard=4) as writer:
        for number in range(7):
            writer.add(f"i{number}", samples.embeds_of(number), "x", **image_of(number))
    write_negative_prompt(tmp_path / "images", samples.embeds_of(3))
    return consolidate(tmp_path / "images")


def test_a_batch_holds_each_sample_s_image(images: ShardIndex, samples: SimpleNamespace) -> None:
    with Stream(images, seed=0, micro_batch_size=3, lanes=2, window=4, text_tokens=5) as stream:
        for _ in range(3):
            batch = stream.next()
            assert batch.latents is None and batch.condition_latents is not None and batch.image_embeds is not None
            for row, key in enumerate(batch.keys):  # the short unit's copies too
                expected = image_of(int(key[1:]))
                assert torch.equal(batch.condition_latents[row], expected["condition_latents"])
                assert torch.equal(batch.image_embeds[row], expected["image_embeds"])
            condition = batch.condition
            assert not isinstance(condition, torch.Tensor) and condition.text is batch.prompt_embeds


def test_the_index_of_a_tar_without_its_sidecar_is_the_writers(images: ShardIndex) -> None:
    for shard in range(2):
        tar = images.local_path(shard)
        assert build_index(tar).to_json() == json.loads(sidecar_path(tar).read_text())


def test_shards_without_images_say_nothing_of_them(dataset: ShardIndex, tmp_path: Path) -> None:
    content = json.loads((tmp_path / "data/index.json").read_text())
    assert not any({"has_condition", "image_embeds"} & record.keys() for record in content["shards"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"has_condition": 1}, "has_condition of .* is 1, expected a boolean"),
        ({"image_embeds": [5]}, r"image_embeds of .* is \[5\], expected \[N, E\]"),
        ({"has_condition": False}, "image_embeds of .* beside a condition"),
    ],
)
def test_an_index_that_lies_about_images_is_refused(images: ShardIndex, change: dict[str, Any], message: str) -> None:
    record = json.loads(sidecar_path(images.local_path(0)).read_text())
    with pytest.raises(UserError, match=message):
        ShardRecord.from_json(record | change, Path("index.json"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"condition_latents": None}, "image_embeds belong to an image's condition_latents"),
        ({"condition_latents": torch.zeros(4, 2, 3, 5)}, r"condition_latents are \[4, 2, 3, 5\], bucket 'b' takes"),
        ({"image_embeds": None}, "image_embeds must be given for all samples of a writer or for none"),
        ({"image_embeds": torch.zeros(4, 10)}, r"image_embeds are \[4, 10\], expected \[5, 10\] as in the samples"),
    ],
)
def test_the_writer_takes_images_of_one_kind(
    tmp_path: Path, samples: SimpleNamespace, change: dict[str, Any], message: str
) -> None:
    with ShardWriter(tmp_path, latent_shape=SHAPE, bucket="b") as writer:
        writer.add("a", samples.embeds_of(0), "x", **image_of(0))
        with pytest.raises(UserError, match=message):
            writer.add("b", samples.embeds_of(0), "x", **(image_of(1) | change))


# A model that wants images


def test_what_takes_text_alone_refuses_the_model(
    image_pipeline: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe(f"model.pretrained={image_pipeline}", "model.config=null")
    with pytest.raises(UserError, match=r"needs images beside captions; make its shards with launch/prepare.py videos"):
        transformer_latents(image_pipeline, BUCKETS[0], "--video 9 32 48")
    mesh: Any = None  # refused before ranks meet
    with pytest.raises(UserError, match="pairs are made by text-to-video teachers"):
        make_pairs(recipe, mesh, tmp_path, Chain(2, 5.0, 3.0), shard_bytes=1)


@pytest.mark.parametrize(
    "shards, message",
    [
        ("plain", "bucket wide holds no images to begin with"),
        ("images", r"bucket images has image_embeds \[5, 10\], expected \[N, 12\]"),
        ("prompts:recipes/prompts.txt", "there are no images to begin with; make shards of videos"),
    ],
)
def test_shards_without_the_model_s_image_are_refused(
    images: ShardIndex, dataset: ShardIndex, tiny_recipe: Callable[..., Recipe], shards: str, message: str
) -> None:
    folder = {"plain": dataset.folder, "images": images.folder}.get(shards, shards)
    config = {"in_channels": 12, "out_channels": 4, "text_dim": 8, "image_dim": 12, "added_kv_proj_dim": 24}
    words = [f"model.config.{name}={value}" for name, value in config.items()]
    recipe = tiny_recipe(*words, "model.config.patch_size=[1,3,3]", f"data.shards={folder}")
    with pytest.raises(UserError, match=message):
        check_sources(recipe, build_model(recipe, "generator"))
