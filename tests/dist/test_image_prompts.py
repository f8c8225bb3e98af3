"""Videos of an image-to-video run: while training, afterwards, from its exported pipeline, and their scores."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Done, run_forked
from PIL import Image
from ranks import run_ranks
from running import train
from safetensors.torch import load_file, save_file

from sgmd_dist.data.format import write_negative_prompt
from sgmd_dist.data.index import consolidate
from sgmd_dist.data.shards import ShardWriter

SHAPE = (3, 3, 4, 6)  # of the latents of 9 x 32 x 48
CAPTIONS = ["a red ball moving left", "a blue bar moving up", "a green ball moving right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_recipe, image_pipeline: Path) -> Path:
    """A run of one step in `run` that took samples on two ranks, and its prompts: three pictures with captions."""
    folder = tmp_path_factory.mktemp("image_prompts")
    torch.manual_seed(0)
    with ShardWriter(folder / "shards", latent_shape=SHAPE, bucket="images", samples_per_shard=16) as writer:
        for number in range(16):
            image = {"condition_latents": torch.randn(SHAPE), "image_embeds": torch.randn(5, 10)}
            writer.add(f"{number:04d}", torch.randn(3, 32), "a caption", **image)
    write_negative_prompt(folder / "shards", torch.randn(2, 32))
    consolidate(folder / "shards")
    with (folder / "prompts.jsonl").open("w") as file:
        for number, caption in enumerate(CAPTIONS):
            Image.effect_noise((60, 40), 120).convert("RGB").save(folder / f"{number}.png")
            file.write(json.dumps({"caption": caption, "image": f"{number}.png"}) + "\n")
    samples = f"samples={{every: 9, prompts: {folder}/prompts.jsonl, formats: [gif], teacher: true, teacher_steps: 2}}"
    words = [f"model.pretrained={image_pipeline}", f"data.shards={folder}/shards", "run.steps=1", samples]
    run_ranks(2, train, write_recipe(folder), words)
    return folder


def sample(folder: Path, model: str, out: str, words: str, program: str = "python") -> Done:
    return run_forked(f"{program} launch/sample.py {folder / model} --out {folder / out} --format gif {words}")


def frames(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        found = []
        for number in range(picture.n_frames):
            picture.seek(number)
            found.append(np.asarray(picture.convert("RGB")).astype(int))
        return np.stack(found)


def videos(folder: Path) -> list[np.ndarray]:
    return [frames(folder / f"{number:04d}-seed-0.gif") for number in range(3)]


def difference(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The greatest of the mean differences of one's pixels; a gif has a palette of its own."""
    return max(float(np.abs(a - b).mean()) for a, b in zip(some, others, strict=True))


def test_a_run_s_own_samples_are_made_again_from_run_and_pipeline(folder: Path) -> None:
    own = folder / "run/samples/step-00000001/generator"
    index = json.loads((own / "videos.json").read_text())
    digest = hashlib.sha256((folder / "1.png").read_bytes()).hexdigest()
    assert index["images"][1] == {"file": str(folder / "1.png"), "sha256": digest}
    assert (folder / "run/samples/teacher/sheet.gif").exists()
    assert run_forked(f"python launch/export.py {folder}/run {folder}/pipeline --pipeline").code == 0
    for model, program in (("run", "torchrun --nproc-per-node=2"), ("pipeline", "python")):
        done = sample(folder, model, f"of_{model}", f"--prompts {folder}/prompts.jsonl", program)
        assert done.code == 0, done.output
        assert difference(videos(folder / f"of_{model}"), videos(own)) < 1
    done = sample(folder, "run", "other", f"--prompts '{CAPTIONS[0]}' --image {folder}/1.png")
    assert done.code == 0, done.output
    of_other_image, of_its_own = frames(folder / "other/0000-seed-0.gif"), videos(own)[0]
    assert difference([of_other_image], [of_its_own]) > 1, "the image decides"


def test_scores_are_of_prompts_with_images(folder: Path) -> None:
    def evaluate(words: str) -> Done:
        fixed = f"--repeats 2 --teacher-steps 2 --batch-size 2 --out {folder}/scores"
        return run_forked(f"torchrun --nproc-per-node=2 launch/evaluate.py {folder}/run {fixed} {words}")

    done = evaluate(f"--prompts {folder}/prompts.jsonl")
    assert done.code == 0, done.output
    scores = json.loads((folder / "scores/scores.json").read_text())
    assert list(scores) == ["before", "after", "teacher"] and scores["after"]["swd"] > 0
    protocol = json.loads((folder / "scores/protocol.json").read_text())["protocol"]
    digests = [hashlib.sha256((folder / f"{number}.png").read_bytes()).hexdigest() for number in range(3)]
    assert (protocol["prompts"], protocol["images"]) == (CAPTIONS, digests)
    (folder / "plain.txt").write_text("\n".join(CAPTIONS))
    for words, message in (
        (f"--prompts {folder}/plain.txt", "has no image to begin with; name a .jsonl file of prompts"),
        (f"--prompts {folder}/prompts.jsonl --vbench {folder}/vbench", "VBench's videos are of captions alone"),
        ("", "an image-to-video model needs a .jsonl file of prompts with images"),
    ):
        done = evaluate(words)
        assert done.code == 2 and message in done.errors()[0], done.output
    assert not (folder / "vbench").exists()


def test_scores_with_another_vae_are_not_set_beside_them(folder: Path, image_pipeline: Path, tmp_path: Path) -> None:
    """The run has moved to a folder whose VAE was trained further."""
    shutil.copytree(image_pipeline, tmp_path / "wan")
    path = tmp_path / "wan/vae/diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(path).items()}, path)
    shutil.copytree(folder / "run", tmp_path / "run")
    recipe = tmp_path / "run/checkpoints/step-00000001/recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(image_pipeline), str(tmp_path / "wan")))
    words = f"--repeats 2 --teacher-steps 2 --prompts {folder}/prompts.jsonl --out {tmp_path}/scores"
    done = run_forked(f"python launch/evaluate.py {tmp_path}/run {words} --against {folder}/scores")
    assert done.code == 2 and "another protocol, so the scores cannot be compared: image_encoders =" in done.errors()[0]


def test_a_recipe_whose_samples_cannot_be_taken_is_refused_before_it_starts(
    folder: Path, image_pipeline: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_pipeline, tmp_path / "wan", ignore=shutil.ignore_patterns("vae"))
    for prompts, pretrained, message in (
        ("[a red ball]", image_pipeline, "samples.prompts: this is an image-to-video model, and 'a red ball' has no"),
        (f"{folder}/prompts.jsonl", tmp_path / "wan", "vae: no such folder, and the model's images need it"),
    ):
        words = f"model.pretrained={pretrained} data.shards={folder}/shards 'samples={{prompts: {prompts}}}'"
        done = run_forked(f"python launch/train.py {folder}/recipe.yaml {words} --check")
        assert done.code == 2 and message in done.errors()[0], done.output


def test_a_sample_without_an_image_is_refused(folder: Path) -> None:
    done = sample(folder, "run", "none", "--prompts 'a red ball'", "torchrun --nproc-per-node=2")
    assert done.code == 2 and {error[:60] for error in done.errors()} == {
        "error: --prompts: this is an image-to-video model, and 'a re"
    }, done.output
    assert "with --image" in done.errors()[0]
