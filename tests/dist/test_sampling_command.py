"""launch/sample.py: the same videos from a run, its exports and any number of ranks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Done, run_forked
from PIL import Image
from ranks import run_ranks
from running import train

from sgmd_dist.decode import latents_as_rgb
from sgmd_dist.generators import Options, open_generator
from sgmd_dist.prompts import Prompt, Prompts, encode
from sgmd_dist.sampling import open_source, sample_video, sample_videos

CAPTIONS = ["a red ball moving left", "a blue bar moving up", "a green ball moving right"]
WORDS = " ".join(f"'{caption}'" for caption in CAPTIONS)
NAMES = [f"{number:04d}-seed-{seed}" for number in range(3) for seed in (0, 1)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, write_recipe) -> Path:
    """A run of one step, with its exports `pipeline` and `weights`."""
    recipe_path = write_recipe(tmp_path_factory.mktemp("sampled"))
    run_ranks(1, train, recipe_path, ["run.steps=1"])
    run_dir = recipe_path.parent / "run"
    for out, words in (("pipeline", "--pipeline"), ("weights", "--ema")):
        assert run_forked(f"python launch/export.py {run_dir} {run_dir / out} {words}").code == 0
    return run_dir


@pytest.fixture(scope="module")
def prompts(run_dir: Path) -> Prompts:
    return encode(open_generator(run_dir, Options()).encoders, [Prompt(caption) for caption in CAPTIONS], "cpu", "")


def sample(model: Path, out: Path, words: str = "", program: str = "python") -> Done:
    command = f"{program} launch/sample.py {model} --prompts {WORDS} --num-seeds 2 --format png --out {out} {words}"
    return run_forked(command)


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("0*.png"))}


@pytest.fixture(scope="module")
def of_the_run(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("videos") / "run"
    done = sample(run_dir, out, "--sheet gif")
    assert done.code == 0, done.output
    return out


def test_each_prompt_is_sampled_with_each_seed(run_dir: Path, prompts: Prompts, of_the_run: Path) -> None:
    found = pictures(of_the_run)
    assert list(found) == NAMES
    network = open_source(run_dir).network("generator", torch.device("cpu"))
    for seed in (0, 1):
        videos = sample_videos(network, prompts, (3, 3, 8, 8), num_steps=4, shift=5.0, seed=seed)
        for number, latents in enumerate(videos):
            expected = torch.cat(list(latents_as_rgb(latents)), dim=1).numpy().astype(int)
            assert np.abs(found[f"{number:04d}-seed-{seed}"] - expected).max() <= 1


def test_what_made_them_is_written_beside_them_with_a_sheet(run_dir: Path, of_the_run: Path) -> None:
    index = json.loads((of_the_run / "videos.json").read_text())
    assert index["model"] == str(run_dir / "checkpoints/step-00000001")
    assert (index["weights"], index["steps"], index["shift"], index["guidance_scale"]) == ("generator", 4, 5.0, 1.0)
    assert index["videos"][3] == {
        "files": ["0001-seed-1.png"], "prompt_number": 1, "prompt": CAPTIONS[1], "seed": 1
    }  # fmt: skip
    with Image.open(of_the_run / "sheet.gif") as sheet:
        assert sheet.n_frames == 3


def test_two_ranks_write_the_same_files(run_dir: Path, of_the_run: Path, tmp_path: Path) -> None:
    done = sample(run_dir, tmp_path, "--sheet gif", "torchrun --nproc-per-node=2")
    assert done.code == 0, done.output
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {path.name: path.read_bytes() for path in of_the_run.iterdir()}


def test_a_pipeline_is_sampled_with_its_own_scheduler(
    run_dir: Path, prompts: Prompts, of_the_run: Path, tmp_path: Path
) -> None:
    done = sample(run_dir / "pipeline", tmp_path)
    assert done.code == 0, done.output
    assert json.loads((tmp_path / "videos.json").read_text())["shift"] is None
    found, expected = pictures(tmp_path), pictures(of_the_run)
    assert list(found) == NAMES and max(np.abs(found[name] - expected[name]).max() for name in NAMES) <= 1
    device = torch.device("cpu")
    generators = [open_generator(run_dir / "pipeline", options) for options in (Options(), Options(shift=5.0))]
    assert generators[0].sigmas != generators[1].sigmas, "one is rounded to float32"
    one, other = (
        sample_video(g.load(device), prompts, 2, g.latent_shape, sigmas=g.sigmas, seed=1) for g in generators
    )
    assert (one - other).abs().max() < 1e-5


def test_a_transformer_s_folder_needs_what_it_does_not_say(
    run_dir: Path, wan_folder: Path, of_the_run: Path, tmp_path: Path
) -> None:
    """An export with a recipe beside it tells all; here it is alone, and is told by the run's."""
    folder = tmp_path / "alone"
    folder.mkdir()
    for path in (run_dir / "weights").glob("*.*"):
        if path.suffix in (".json", ".safetensors"):
            (folder / path.name).symlink_to(path)
    said = ""
    for missing, words in (
        ("--steps N", "--steps 4"),
        ("--shift NUMBER", "--shift 5"),
        ("--size FRAMESxHEIGHTxWIDTH", "--size 3x8x8"),
        ("--pretrained FOLDER", f"--pretrained {wan_folder}"),
    ):
        done = sample(folder, tmp_path / "out", said)
        assert done.code == 2 and len(done.errors()) == 1 and missing in done.errors()[0], done.output
        said += f" {words}"
    assert sample(folder, tmp_path / "out", said).code == 0
    done = sample(folder, tmp_path / "told", f"--recipe {run_dir / 'recipe.yaml'}")
    assert done.code == 0, done.output
    assert sample(run_dir, tmp_path / "ema", "--ema").code == 0
    found, expected, raw = (pictures(where) for where in (tmp_path / "told", tmp_path / "ema", of_the_run))
    assert max(np.abs(found[name] - expected[name]).max() for name in NAMES) == 0
    assert max(np.abs(found[name] - raw[name]).max() for name in NAMES) > 0


def test_what_cannot_be_sampled_is_refused(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/pytorch_lora_weights.safetensors").write_bytes(b"")
    (tmp_path / "pair/transformer_2").mkdir(parents=True)
    (tmp_path / "pair/transformer").symlink_to(run_dir / "weights")
    shutil.copytree(run_dir / "checkpoints", tmp_path / "moved/checkpoints")
    recipe = tmp_path / "moved/checkpoints/step-00000001/recipe.yaml"
    recipe.write_text(re.sub(r"pretrained: .*", "pretrained: gone", recipe.read_text()))
    for model, words, message in (
        (tmp_path / "moved", "", f"{recipe}: model.generator.pretrained = 'gone': no such folder"),
        (tmp_path / "lora", "", "export that with --merge"),
        (tmp_path / "pair", "", "export the run with --pipeline"),
        (run_dir / "pipeline", "--ema", "leave out --ema"),
        (tmp_path, "", "expected a checkpoint"),
        (run_dir, f"--pretrained {tmp_path}", f"--pretrained {tmp_path}: expected a diffusers folder with text_encoder"),
        (run_dir, "--recipe recipes/tiny_sgmd.yaml", "has the recipe of its training; leave out --recipe"),
        (run_dir, "--image a.png", "is a text-to-video model; leave out --image"),
        (run_dir, "--family ltx", "says model.family = wan; leave out"),
        (run_dir / "pipeline", "--family ltx", "says model.family = wan; leave out"),
        (run_dir, "--size 3x7x8", "--size 3x7x8: data.video.height = 7: expected"),
        (run_dir, f"--out {run_dir / 'recipe.yaml'}/videos", "recipe.yaml is no folder; choose another folder"),
    ):
        done = sample(model, tmp_path / "out", words)
        assert done.code == 2 and len(done.errors()) == 1 and message in done.errors()[0], done.output
