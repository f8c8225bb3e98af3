"""What `data.shards` may name: the world and prompt files become shards once; everything wrong is found before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load as load_safetensors

from sgmd_dist.assemble import build_model
from sgmd_dist.data import sources
from sgmd_dist.data.digest import content_digest
from sgmd_dist.data.sources import captions_of, check_sources, latent_shape_of, open_shards
from sgmd_dist.data.world import World
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import VideoModel
from sgmd_dist.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
VIDEO = "data.video={num_frames: 3, height: 8, width: 10}"


@pytest.fixture(autouse=True)
def _a_small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "WORLD_SAMPLES", 6)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball\n\n  a blue bar  \n\n")
    return path


def model_of(recipe: Recipe) -> VideoModel:
    return build_model(recipe, "generator")


def message(recipe: Recipe) -> str:
    """The message of the check, which has to be that of opening, and nothing may have been written by either."""
    with pytest.raises(UserError) as checked:
        check_sources(recipe, model_of(recipe))
    with pytest.raises(UserError) as opened:
        open_shards(recipe, model_of(recipe))
    assert str(checked.value) == str(opened.value)
    assert not Path(recipe.run.dir).exists()
    return str(checked.value)


def cached(recipe: Recipe) -> list[Path]:
    return sorted((Path(recipe.run.dir) / "cache").iterdir())


# The world


def test_the_world_becomes_shards_with_latents_in_the_run_folder(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe()
    index = open_shards(recipe, model_of(recipe))
    assert index.num_samples == 6
    assert index.latent_shape(0) == World().latent_shape == latent_shape_of(recipe, model_of(recipe))
    assert index.has_latents(0)
    assert index.embed_dim == 32
    assert cached(recipe) == [index.folder]


def test_shards_are_written_once(tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe()
    first = open_shards(recipe, model_of(recipe))
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = open_shards(recipe, model_of(recipe))
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == times
    assert again.fingerprint == first.fingerprint


def test_another_size_of_the_world_gets_shards_of_its_own(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    first = open_shards(recipe, model_of(recipe))
    monkeypatch.setattr(sources, "WORLD_SAMPLES", 4)
    assert open_shards(recipe, model_of(recipe)).num_samples == 4
    assert len(cached(recipe)) == 2 and first.folder in cached(recipe)


@pytest.mark.parametrize("source", ["world:moving_shapes", "prompts:prompts.txt"])
def test_a_kill_while_shards_were_written_does_not_stop_the_next_run(
    tiny_recipe: MakeRecipe, prompts: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    recipe = tiny_recipe(f"data.shards={source!r}", VIDEO)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources, "write_negative_prompt", die)
        patch.setattr("sgmd_dist.data.world.write_negative_prompt", die)
        with pytest.raises(KeyboardInterrupt):
            open_shards(recipe, model_of(recipe))
    (leftover,) = cached(recipe)
    assert any(path.suffix == ".tar" for path in leftover.iterdir())
    index = open_shards(recipe, model_of(recipe))
    assert cached(recipe) == [index.folder] != [leftover]


def test_a_world_that_the_model_cannot_take_is_named_before_it_is_written(tiny_recipe: MakeRecipe) -> None:
    text = message(tiny_recipe("model.config.in_channels=16", "model.config.out_channels=16"))
    assert text.startswith("data.shards = 'world:moving_shapes': the world has latents (3, ")
    assert "the model takes 16 channels" in text


def test_an_unknown_world_is_named_with_the_known(tiny_recipe: MakeRecipe) -> None:
    assert message(tiny_recipe("data.shards='world:moving'")) == (
        "data.shards = 'world:moving': no such world; expected world:moving_shapes"
    )


# Prompt files


def test_a_prompts_file_becomes_captions_with_the_latent_shape_of_the_video(
    tiny_recipe: MakeRecipe, prompts: Path
) -> None:
    recipe = tiny_recipe(f"data.shards='prompts:{prompts}'", VIDEO)
    index = open_shards(recipe, model_of(recipe))
    assert index.num_samples == 2
    assert index.latent_shape(0) == (3, 3, 8, 10) == latent_shape_of(recipe, model_of(recipe))
    assert not index.has_latents(0)
    assert index.negative_prompt().shape == (1, 32)


def test_changed_prompts_are_encoded_anew(tiny_recipe: MakeRecipe, prompts: Path) -> None:
    recipe = tiny_recipe(f"data.shards='prompts:{prompts}'", VIDEO)
    open_shards(recipe, model_of(recipe))
    prompts.write_text("a red ball\na blue bar\na green pillar\n")
    assert open_shards(recipe, model_of(recipe)).num_samples == 3


def test_a_prompts_file_needs_the_size_of_the_videos(tiny_recipe: MakeRecipe, prompts: Path) -> None:
    assert message(tiny_recipe("data.shards='prompts:prompts.txt'")) == (
        "data.shards = 'prompts:prompts.txt': set data.video to num_frames, height and width of the videos"
    )


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "no such file (working directory "),
        (b"", "the file holds no captions; write one per line"),
        (b" \n\t\n", "the file holds no captions; write one per line"),
        ("café".encode("latin-1"), "cannot be read as UTF-8 text ('utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_an_unfit_prompts_file_is_named(tiny_recipe: MakeRecipe, content: bytes | None, expected: str) -> None:
    if content is not None:
        Path("mine.txt").write_bytes(content)
    recipe = tiny_recipe("data.shards='prompts:mine.txt'", VIDEO)
    assert message(recipe).startswith(f"data.shards = 'prompts:mine.txt': {expected}")
    with pytest.raises(UserError, match=r"data\.shards = 'prompts:mine\.txt'"):
        captions_of(recipe)


def test_objects_do_not_become_captions(tiny_recipe: MakeRecipe) -> None:
    Path("mine.jsonl").write_text('{"caption": "a red ball", "image": "ball.png"}')
    assert "a .jsonl file is no list of captions" in message(tiny_recipe("data.shards='prompts:mine.jsonl'", VIDEO))


def test_a_folder_is_no_prompts_file(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    assert "cannot be read as UTF-8 text ([Errno 21]" in message(
        tiny_recipe(f"data.shards='prompts:{tmp_path}'", VIDEO)
    )


# The text encoder


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer", "everything"])
@pytest.mark.parametrize("source", ["world:moving_shapes", "prompts:prompts.txt"])
def test_sources_need_a_text_encoder(tiny_recipe: MakeRecipe, prompts: Path, source: str, missing: str) -> None:
    for part in {"text_encoder", "tokenizer"} - {missing} if missing != "everything" else ():
        Path("pipeline", part).mkdir(parents=True)
    recipe = tiny_recipe(f"data.shards={source!r}", VIDEO, "data.text_encoder=pipeline")
    assert message(recipe).startswith(f"data.text_encoder = 'pipeline': data.shards = {source!r} needs a text encoder")


def test_without_data_text_encoder_it_is_looked_for_in_the_pretrained_folder(tiny_recipe: MakeRecipe) -> None:
    assert message(tiny_recipe("data.text_encoder=null")).startswith("model.pretrained = None: data.shards = ")


def test_the_encoders_content_decides_whether_shards_are_written_anew(
    tiny_recipe: MakeRecipe, prompts: Path, wan_copy: Path, tmp_path: Path
) -> None:
    """Not its place, and no times: a moved or copied encoder is the same one, another one at the same place is not."""

    def folder_with(encoder: Path) -> Path:
        recipe = tiny_recipe(f"data.shards='prompts:{prompts}'", VIDEO, f"data.text_encoder={encoder}")
        return open_shards(recipe, model_of(recipe)).folder

    first = folder_with(wan_copy)
    moved = wan_copy.rename(tmp_path / "moved")
    for path in moved.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert folder_with(moved) == first
    weights = moved / "text_encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    second = folder_with(moved)
    config = moved / "tokenizer" / "tokenizer_config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    assert len({first, second, folder_with(moved)}) == 3


def test_the_digest_of_large_files_samples_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    data = bytearray(os.urandom(10 * 2**20))
    digests = []
    for change in (None, 10, len(data) - 1):  # in the header, at the end
        if change is not None:
            data[change] ^= 1
        path.write_bytes(data)
        digests.append(content_digest([tmp_path]))
    path.write_bytes(data[: 2**20] + os.urandom(9 * 2**20))
    digests.append(content_digest([tmp_path]))
    path.rename(tmp_path / "other.safetensors")
    digests.append(content_digest([tmp_path]))
    assert len(set(digests)) == 5


# Folders of shards


def test_a_folder_is_opened_where_it_lies(tiny_recipe: MakeRecipe, samples: SimpleNamespace) -> None:
    samples.write_dataset(Path("folder"), 7)
    model = ["model.config.in_channels=4", "model.config.out_channels=4", "model.config.text_dim=8"]
    recipe = tiny_recipe("data.shards=folder", *model, "model.config.patch_size=[1, 3, 3]")
    index = open_shards(recipe, model_of(recipe))
    assert index.num_samples == 7
    assert latent_shape_of(recipe, model_of(recipe)) == samples.latent_shapes["wide"]
    assert not Path(recipe.run.dir).exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["text_dim=16"], "prompt embeddings are 8 wide, the model's text_dim is 16; prepare the shards with"),
        (["in_channels=3", "out_channels=3"], "has latents (4, 2, 3, 6); the model takes 3 channels"),
        (["patch_size=[1, 2, 2]"], "frames, height, width in multiples of (1, 2, 2)"),
        (["patch_size=[4, 3, 3]"], "frames, height, width in multiples of (4, 3, 3)"),
    ],
)
def test_shards_that_do_not_fit_the_model_are_named(
    tiny_recipe: MakeRecipe, samples: SimpleNamespace, words: list[str], expected: str
) -> None:
    samples.write_dataset(Path("folder"), 7)
    fit = ["in_channels=4", "out_channels=4", "text_dim=8", "patch_size=[1, 3, 3]"]
    text = message(tiny_recipe("data.shards=folder", *(f"model.config.{word}" for word in [*fit, *words])))
    assert text.startswith("data.shards = 'folder': ") and expected in text


@pytest.mark.parametrize("shards", ["nowhere", "[nowhere]", "[world:moving_shapes, nowhere]", "nowhere/a.tar"])
def test_a_missing_folder_is_named_also_beside_others(tiny_recipe: MakeRecipe, shards: str) -> None:
    assert message(tiny_recipe(f"data.shards={shards}")).startswith("nowhere")


def test_an_empty_folder_holds_no_shards(tiny_recipe: MakeRecipe) -> None:
    Path("empty").mkdir()
    assert message(tiny_recipe("data.shards=empty")).startswith("empty: holds no .tar shards")


# Captions for sampling and scores


def test_captions_are_the_world_s_or_the_recipe_s(tiny_recipe: MakeRecipe, prompts: Path) -> None:
    assert captions_of(tiny_recipe()) == World().captions()
    assert captions_of(tiny_recipe("data.shards='prompts:prompts.txt'")) == ["a red ball", "a blue bar"]


def test_shards_without_a_caption_list_ask_for_a_file(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(
        UserError, match=r"data\.shards = 'folder': name the captions with --prompts FILE, one per line"
    ):
        captions_of(tiny_recipe("data.shards=folder"))


def test_a_video_size_wins_over_what_the_shards_hold(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(VIDEO)
    assert latent_shape_of(recipe, model_of(recipe)) == (3, 3, 8, 10)


def test_embeddings_are_stored_as_the_encoder_gives_them(tiny_recipe: MakeRecipe, prompts: Path) -> None:
    """Without padding, in bfloat16: the sample's file says how many tokens the caption has."""
    recipe = tiny_recipe(f"data.shards='prompts:{prompts}'", VIDEO)
    index = open_shards(recipe, model_of(recipe))
    data = index.paths[0].read_bytes()
    start, size = int(index.offset[0]), int(index.size[0])
    tensors = load_safetensors(data[start : start + size])
    assert set(tensors) == {"prompt_embeds"}
    assert tensors["prompt_embeds"].shape == (4, 32) and tensors["prompt_embeds"].dtype == torch.bfloat16
