"""Videos and captions of a manifest become samples: what VAE and text encoder say of them, and the reason otherwise."""

from __future__ import annotations

import json
import shutil
import tarfile
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_families import FAMILIES, LATENTS

from sgmd_dist.data.encode import TextEncoder
from sgmd_dist.data.format import parse_safetensors, read_negative_prompt
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.manifest import Row, read_videos
from sgmd_dist.data.preparation import Sample, Skipped, prepare
from sgmd_dist.data.row_encoders import (
    CaptionRows,
    VideoRows,
    _ahead,
    fingerprint,
    pretrained_fingerprint,
    text_encoding_of,
    transformer_latents,
)
from sgmd_dist.data.video import Bucket, parse_buckets, probe, read_clip
from sgmd_dist.errors import UserError

REPO = Path(__file__).parents[3]
FPS = Fraction(16)
BUCKETS = parse_buckets("13x32x48,13x48x32,5x48x32")
CAPTIONS = ["a red ball moving left", "a green bar moving up", "a blue ball moving down"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, clips: Callable[..., None]) -> Path:
    """Three whole videos, and four that are of no use."""
    folder = tmp_path_factory.mktemp("videos")
    clips(folder / "0_wide.mp4", 30, rate=24, height=36, width=64)
    clips(folder / "1_tall.webm", 16, height=64, width=36)
    clips(folder / "2_tall_short.mp4", 8, height=64, width=36)
    clips(folder / "3_too_short.mp4", 4)
    clips(folder / "4_no_caption.mp4", 4)
    (folder / "5_junk.mp4").write_bytes(b"junk" * 1000)
    captions = ["0_wide", "1_tall", "2_tall_short", "3_too_short", "5_junk"]
    for number, name in enumerate(captions):
        (folder / f"{name}.txt").write_text(CAPTIONS[number % 3])
    return folder


def loaded(folder: Path, video_pipeline: Path, captions_at_once: int = 2) -> VideoRows:
    return VideoRows.load(
        read_videos(folder), video_pipeline, BUCKETS, frames_per_second=FPS, captions_at_once=captions_at_once
    )


def test_rows_become_samples_or_reasons(folder: Path, video_pipeline: Path) -> None:
    rows = read_videos(folder).rows
    results = list(loaded(folder, video_pipeline).encode(rows))
    assert [row for row, _ in results] == rows
    samples = [result for _, result in results if isinstance(result, Sample)]
    assert [(sample.bucket, sample.latent_shape) for sample in samples] == [
        ("13x32x48", (3, 4, 4, 6)),
        ("13x48x32", (3, 4, 6, 4)),
        ("5x48x32", (3, 2, 6, 4)),
    ]
    assert samples[0].source == "0_wide.mp4"
    assert samples[0].extra_json == {"fps": 16.0, "source_fps": 24.0, "source_size": [36, 64]}
    reasons = [result.reason for _, result in results if isinstance(result, Skipped)]
    assert reasons[:2] == [
        "too short: 4 frames at 16 per second, the shortest bucket has 5",
        "no caption: there is no text file of its name beside it",
    ]
    assert reasons[2].startswith("unreadable: Invalid data") and len(reasons) == 3


def test_shards_hold_what_the_networks_say(tmp_path: Path, folder: Path, video_pipeline: Path) -> None:
    rows = read_videos(folder).rows
    summary = prepare(tmp_path, rows, {}, loaded(folder, video_pipeline), shard_bytes=10**9)
    assert (summary.num_encoded, summary.num_skipped) == (3, 3)
    vae = AutoencoderKLWan.from_pretrained(video_pipeline / "vae").eval()
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    text_encoder = TextEncoder.from_pretrained(video_pipeline, torch.bfloat16)
    found = {}
    for shard in tmp_path.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[kind] = file.read()
    assert sorted(found) == ["00000000", "00000001", "00000002"]
    for row in rows[:3]:
        parts = found[f"{row.number:08d}"]
        description, tensors = json.loads(parts["json"]), parse_safetensors(memoryview(parts["sample.safetensors"]))
        assert (description["caption"], description["source"]) == (row.caption, row.video)
        path = folder / description["source"]
        pictures = read_clip(path, probe(path, Fraction(9)), FPS, parse_buckets(description["bucket"])[0])
        with torch.no_grad():
            pixels = (pictures.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
            latents = (vae.encode(pixels).latent_dist.mode()[0] - mean) / std
        assert tensors["latents"].dtype == torch.bfloat16
        torch.testing.assert_close(tensors["latents"], latents.bfloat16())
        [embeds] = text_encoder.encode([row.caption or ""])
        torch.testing.assert_close(tensors["prompt_embeds"], embeds)
        assert embeds.shape == (6, 32)  # five words and the end, without padding
    assert torch.equal(read_negative_prompt(tmp_path), text_encoder.encode([""])[0])


def test_latents_that_are_not_finite_are_a_reason(
    folder: Path, video_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loaded(folder, video_pipeline)
    monkeypatch.setattr(encoder._autoencoder, "encode", lambda pictures: torch.full((3, 4, 4, 6), torch.nan))
    [(_, result)] = encoder.encode(read_videos(folder).rows[:1])
    assert result == Skipped("its latents are not finite")


def test_leaving_early_ends_the_reading_thread(folder: Path, video_pipeline: Path) -> None:
    results = loaded(folder, video_pipeline, 1).encode(read_videos(folder).rows)
    next(results)
    assert any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    results.close()
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


@pytest.mark.parametrize("buckets, message", [
    ("12x32x48", r"--buckets: 12x32x48: 12 frames: the VAE takes 4n \+ 1; use 9 or 13"),
    ("13x32x48,13x30x48", r"--buckets: 13x30x48: height 30: expected a multiple of the VAE's 8"),
])  # fmt: skip
def test_buckets_that_the_vae_does_not_take(folder: Path, video_pipeline: Path, buckets: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VideoRows.load(read_videos(folder), video_pipeline, parse_buckets(buckets), frames_per_second=FPS)


def test_buckets_that_the_transformer_does_not_take(tmp_path: Path, folder: Path, video_pipeline: Path) -> None:
    shutil.copytree(video_pipeline, tmp_path / "pipeline")
    shutil.copytree(REPO / "recipes/tiny_wan/transformer", tmp_path / "pipeline/transformer")
    manifest = read_videos(folder)
    VideoRows.load(manifest, tmp_path / "pipeline", BUCKETS[:2], frames_per_second=FPS)
    with pytest.raises(
        UserError,
        match=r"--buckets: 5x48x32: its latents are \(3, 2, 6, 4\); .*transformer takes 3 channels and frames, height,"
        r" width in multiples of \(4, 2, 2\)",
    ):
        VideoRows.load(manifest, tmp_path / "pipeline", BUCKETS, frames_per_second=FPS)


def test_captions_alone_have_the_transformer_s_latent_shape(tmp_path: Path) -> None:
    shape = transformer_latents(REPO / "recipes/tiny_wan", Bucket(8, 12, 16), "--video 8 12 16")
    assert shape == (3, 8, 12, 16)
    text_encoder = TextEncoder.from_pretrained(REPO / "recipes/tiny_wan", torch.bfloat16)
    encoder = CaptionRows(text_encoder, shape, negative_prompt="a bar", captions_at_once=2)
    rows = [Row(number, None, caption) for number, caption in enumerate(CAPTIONS)]
    assert prepare(tmp_path, rows, {}, encoder, shard_bytes=10**9).num_encoded == 3
    index = ShardIndex.open(tmp_path)
    assert index.buckets == ["3x8x12x16"] and index.latent_shape(0) == shape and not index.has_latents(0)
    assert torch.equal(index.negative_prompt(), text_encoder.encode(["a bar"])[0])


def test_a_video_that_the_transformer_does_not_take() -> None:
    with pytest.raises(UserError, match=r"--video 7 12 16: .*num_frames = 7: expected a multiple of 4"):
        transformer_latents(REPO / "recipes/tiny_wan", Bucket(7, 12, 16), "--video 7 12 16")


# What decides whether an attempt may be continued


def test_rows_are_known_by_their_content() -> None:
    rows = [Row(0, "a", "b"), Row(1, "c", None)]
    assert fingerprint(rows) == fingerprint(list(rows))
    others = [rows[:1], rows[::-1], [rows[0], Row(1, "c", "")], [rows[0], Row(1, "c", None, "x")], [Row(0, "ab", "")]]
    assert len({fingerprint(other) for other in [rows, *others]}) == 6


def test_a_pretrained_folder_is_known_by_its_content_wherever_it_lies(tmp_path: Path, video_pipeline: Path) -> None:
    parts = ("vae", "text_encoder")
    before = pretrained_fingerprint(video_pipeline, parts)
    shutil.copytree(video_pipeline, tmp_path / "copy")
    assert pretrained_fingerprint(tmp_path / "copy", parts) == before
    config = tmp_path / "copy/vae/config.json"
    config.write_text(config.read_text().replace("0.1", "0.2"))
    assert pretrained_fingerprint(tmp_path / "copy", parts) != before
    assert pretrained_fingerprint(tmp_path / "copy", parts[1:]) == pretrained_fingerprint(video_pipeline, parts[1:])


# Reading ahead


def test_what_is_read_ahead_comes_in_order_and_not_too_early() -> None:
    made: list[int] = []
    items = _ahead(lambda item: made.append(item) or item, range(20), depth=2)
    for number in range(20):
        assert next(items) == number
        assert len(made) <= number + 3
    with pytest.raises(StopIteration):
        next(items)


def test_an_error_ahead_comes_at_its_item() -> None:
    items = _ahead(lambda item: 1 // item, [1, 1, 0, 1], depth=2)
    assert [next(items), next(items)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_folder_is_of_the_family_whose_network_it_names(name: str, tmp_path: Path) -> None:
    """Each with its own grid of latents and its own way to encode captions."""
    folder = FAMILIES[name].save(tmp_path)
    assert transformer_latents(folder, Bucket(3, 8, 8), "--video 3 8 8") == LATENTS
    encoding = text_encoding_of(folder)
    assert encoding is not None and encoding.is_cleaned is False
    assert encoding.keeps_padding == (name == "cogvideox") and (encoding.chat is None) == (name != "hunyuan_video_15")


def test_a_network_of_no_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "Other3DModel"}')
    with pytest.raises(UserError, match=r"describes Other3DModel, expected one of .*LTXVideoTransformer3DModel"):
        transformer_latents(tmp_path, Bucket(3, 8, 8), "--video 3 8 8")
