"""Prompts: captions with or without images, from words and files, and what they become."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sgmd_dist import prompts as prompts_module
from sgmd_dist.autoencoder import Autoencoder
from sgmd_dist.batch import padded
from sgmd_dist.conditions import TextAndImage
from sgmd_dist.data.encode import NEGATIVE_PROMPT, TextEncoder
from sgmd_dist.data.image_encoder import ImageEncoder
from sgmd_dist.data.picture import read_picture
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import VideoModel
from sgmd_dist.models.wan import Section, build
from sgmd_dist.prompts import Encoders, Images, ImageSource, Prompt, Prompts, check_prompts, encode, read_prompts

SHAPE = (3, 3, 4, 6)  # of the latents of 9 x 32 x 48


def model_of(folder: Path) -> VideoModel:
    return build(Section(family="wan", compute_dtype="float32"), str(folder), "model.pretrained")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, size in (("wide.png", (96, 40)), ("tall.png", (40, 96))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / name)
    return tmp_path


# Files and words


def test_captions_are_files_only_where_there_are_such(tmp_path: Path) -> None:
    (tmp_path / "two").write_text("\ufeffa\r\n\r\nb\n", encoding="utf-8")
    long = "球" * 200  # fewer characters than a file's name may have bytes, in more bytes
    words = [str(tmp_path / "two"), long, "a/b", "x" * 300]
    assert read_prompts(words) == [Prompt(caption) for caption in ("a", "b", long, "a/b", "x" * 300)]


def test_lines_with_images_name_them_from_their_folder(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"caption": " a ", "image": "x/1.png"}\n\n{"caption": "b", "image": "/2.png"}\n{"caption": "c"}\n')
    named = [Prompt("a", tmp_path / "x/1.png"), Prompt("b", Path("/2.png"))]
    assert read_prompts([str(path), "d"]) == [*named, Prompt("c"), Prompt("d")]
    common = tmp_path / "0.png"
    Image.new("RGB", (8, 8)).save(common)
    assert read_prompts([str(path), "d"], common) == [*named, Prompt("c", common), Prompt("d", common)]
    with pytest.raises(UserError, match=r"^--image: image gone\.png: cannot be read as a picture"):
        read_prompts(["d"], Path("gone.png"))


def test_a_caption_is_one_line_whatever_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "p.JSONL").write_text('{"caption": "a\\nb \u2028 c"}\n', encoding="utf-8")
    assert read_prompts([str(tmp_path / "p.JSONL")]) == [Prompt("a b c")]


@pytest.mark.parametrize("word", ["nowhere.txt", "nowhere.jsonl"])
def test_a_missing_file_is_named_as_the_user_gave_it(word: str) -> None:
    with pytest.raises(UserError, match=rf"^--prompts {word}: no such file"):
        read_prompts([word])


@pytest.mark.parametrize(
    "line, found",
    [
        ("a red ball", "is not JSON"),
        ("[1]", "is a JSON list"),
        ("[" * 100_000, "is not JSON"),
        ('{"caption": "a", "picture": "a.png"}', "'picture' is no key of a prompt; expected {"),
        ('{"image": "a.png"}', "caption = None; expected {"),
        ('{"caption": " "}', "caption = ' '; expected {"),
        ('{"caption": "a", "image": 3}', "image = 3; expected {"),
        ('{"caption": "a", "image": ""}', "image = ''; expected {"),
        ('{"caption": "a \\ud800"}', "holds half of a character"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"caption": "a"}\n\n' + line)
    with pytest.raises(UserError, match=rf"p\.jsonl, line 3: {re.escape(found)}"):
        read_prompts([str(path)])


@pytest.mark.parametrize("content, found", [(b"\n", "holds no prompts"), (b"\xff", "cannot be read as UTF-8 text")])
def test_a_file_that_is_none_of_prompts_is_named(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"^--prompts .*p\.jsonl: .*{found}.*expected {{"):
        read_prompts([str(tmp_path / "p.jsonl")])


@pytest.mark.parametrize("name", ["p.json", "p.csv"])
def test_other_files_do_not_become_captions(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"caption": "a"}')
    with pytest.raises(UserError, match=r"is no list of captions; write a text file with one caption per line"):
        read_prompts([str(tmp_path / name)])


def test_an_image_to_video_model_needs_a_picture_for_each(image_pipeline: Path, pictures: Path) -> None:
    model, good = model_of(image_pipeline), Prompt("a", pictures / "wide.png")
    check_prompts([good], model, "--prompts")
    with pytest.raises(UserError, match="--prompts: this is an image-to-video model, and 'b' has no image"):
        check_prompts([good, Prompt("b")], model, "--prompts")
    with pytest.raises(UserError, match=r"--prompts: image .*gone\.png: cannot be read as a picture \(no such file\)"):
        check_prompts([good, Prompt("b", pictures / "gone.png")], model, "--prompts")


# Encoding


def test_images_are_encoded_as_prepared_videos_are(image_pipeline: Path, pictures: Path) -> None:
    model = model_of(image_pipeline)
    encoders = Encoders(model, image_pipeline, 8, ImageSource(image_pipeline, image_pipeline, SHAPE))
    given = [Prompt("a red ball", pictures / "wide.png"), Prompt("a blue bar", pictures / "tall.png")]
    prompts = encode(encoders, given, "cpu", "--prompts")
    vae, encoder = Autoencoder.load(image_pipeline / "vae"), ImageEncoder.load(image_pipeline)
    for number, prompt in enumerate(given):
        picture = read_picture(prompt.image or Path(), 32, 48, "")
        condition = prompts.condition([number], "cpu")
        assert isinstance(condition, TextAndImage) and condition.embeds is not None
        assert torch.equal(condition.latents[0], vae.encode_first(picture.expand(9, -1, -1, -1)).bfloat16())
        assert torch.equal(condition.embeds[0], encoder.encode(picture).bfloat16())
        assert torch.equal(condition.text, prompts.embeds[number : number + 1])
    digest = hashlib.sha256((pictures / "tall.png").read_bytes()).hexdigest()
    assert prompts.facts["images"][1] == {"file": str(pictures / "tall.png"), "sha256": digest}


def test_a_text_to_video_model_passes_over_images(video_pipeline: Path, image_pipeline: Path, pictures: Path) -> None:
    """One file of prompts serves both."""
    model = model_of(Path("recipes/tiny_wan"))
    encoders = Encoders(model, video_pipeline, 8)
    with_images = encode(encoders, [Prompt("a", pictures / "gone.png")], "cpu", "")
    assert with_images.images is None and with_images.facts == {}
    assert torch.equal(with_images.embeds, encode(encoders, [Prompt("a")], "cpu", "").embeds)


def test_the_negative_prompt_is_encoded_by_itself(video_pipeline: Path) -> None:
    prompts = encode(Encoders(model_of(Path("recipes/tiny_wan")), video_pipeline, 8), [Prompt("a")], "cpu", "")
    [expected] = TextEncoder.from_pretrained(video_pipeline).encode([NEGATIVE_PROMPT])
    assert torch.equal(prompts.negative, padded(expected.bfloat16(), 8)[None])
    assert prompts.embeds.shape == (1, 8, 32) and not torch.equal(prompts.embeds, prompts.negative)


def test_what_encodes_images_must_be_there(image_pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    model, given = model_of(image_pipeline), [Prompt("a", pictures / "wide.png")]
    with pytest.raises(UserError, match="'a' has no image"):
        encode(Encoders(model, image_pipeline, 8), [Prompt("a")], "cpu", "--prompts")
    with pytest.raises(UserError, match=r"--prompts: images .* need its VAE, .* or with --pretrained"):
        encode(Encoders(model, image_pipeline, 8), given, "cpu", "--prompts")
    for part in ("vae", "image_encoder", "image_processor"):
        shutil.copytree(image_pipeline, tmp_path / part, ignore=shutil.ignore_patterns(part))
        source = ImageSource(tmp_path / part, tmp_path / part, SHAPE)
        with pytest.raises(UserError, match=rf"--prompts: .*/{part}: no such folder, and the model's images need it"):
            encode(Encoders(model, image_pipeline, 8, source), given, "cpu", "--prompts")


def test_another_model_s_vae_is_refused(image_pipeline: Path, pictures: Path) -> None:
    source = ImageSource(image_pipeline, image_pipeline, (4, *SHAPE[1:]))
    encoders = Encoders(model_of(image_pipeline), image_pipeline, 8, source)
    with pytest.raises(UserError, match=r"vae: makes latents \(3, 3, 4, 6\) of 9x32x48, the model takes \(4,"):
        encode(encoders, [Prompt("a", pictures / "wide.png")], "cpu", "--prompts")


def test_the_cpu_encodes_where_the_device_has_no_room(
    image_pipeline: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = Encoders(model_of(image_pipeline), image_pipeline, 8, ImageSource(image_pipeline, image_pipeline, SHAPE))
    given = [Prompt("a", pictures / "wide.png")]
    expected, errors, load = encode(encoders, given, "cpu", ""), [torch.OutOfMemoryError("full")], Autoencoder.load

    def fail_once(*arguments: Any) -> Autoencoder:
        if errors:
            raise errors.pop()
        return load(*arguments)

    monkeypatch.setattr(prompts_module.Autoencoder, "load", fail_once)
    found = encode(encoders, given, "cpu", "")
    assert errors == [] and found.images is not None and expected.images is not None
    assert torch.equal(found.images.latents, expected.images.latents)


@pytest.mark.parametrize("with_embeds", [True, False])
def test_chosen_and_repeated_prompts_keep_text_and_image_together(with_embeds: bool) -> None:
    def numbered(*rest: int) -> torch.Tensor:
        return torch.arange(3.0).view(3, *(1 for _ in rest)).expand(3, *rest)

    embeds = numbered(5, 2) if with_embeds else None
    images = Images(numbered(*SHAPE), embeds, [{"file": name, "sha256": ""} for name in "abc"])
    prompts = Prompts(["a", "b", "c"], numbered(4, 2), torch.zeros(1, 4, 2), images).repeated(2)
    assert prompts.captions == ["a", "b", "c"] * 2 and [f["file"] for f in prompts.facts["images"]] == [*"abc"]
    condition = prompts.condition(range(2, 5), "cpu")
    assert isinstance(condition, TextAndImage) and (condition.embeds is not None) == with_embeds
    parts = [part for part in (condition.text, condition.latents, condition.embeds) if part is not None]
    assert all(part.flatten(1)[:, 0].tolist() == [2.0, 0.0, 1.0] for part in parts)
