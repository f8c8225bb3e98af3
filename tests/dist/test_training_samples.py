"""Samples while training: those that launch/sample.py makes later, on any ranks, without influence on the training."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import run_ranks
from running import State, max_difference, parameter_difference, train, train_until_stopped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from sgmd_dist import trainer, training_samples
from sgmd_dist.errors import EXIT_PREEMPTED
from sgmd_dist.parallel.mesh import build_mesh, process_group
from sgmd_dist.prompts import Prompt, Prompts, encode, encoders_of
from sgmd_dist.sampling import Source, open_source, sample_videos
from sgmd_dist.training_samples import Guided, TrainingSamples
from sgmd_dist.video_folder import Take

NUM_BLOCKS = 1  # of the network: the run around it is what is tested
CAPTIONS = ["a red ball moving left", "a blue bar moving up", "a green ball moving right"]
SEED = 7
NAMES = [f"{number:04d}-seed-{SEED}" for number in range(3)]
TO_SAMPLE = "every: 2, prompts: [" + ", ".join(CAPTIONS) + f"], seeds: [{SEED}], formats: [gif]"
SAMPLE = [
    "run.steps=3",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "logging.tensorboard=true",
    f"samples={{{TO_SAMPLE}, teacher: true, teacher_steps: 2}}",
]


class KeepsLatents(TrainingSamples):
    """Writes the latents of all videos into a folder beside them."""

    def latents(self, velocity_of: Guided, facts: Mapping[str, Any]) -> dict[Take, Tensor]:
        found = super().latents(velocity_of, facts)
        if self._mesh.rank % self._mesh.layout.sequence_size == 0:
            for take, video in found.items():
                path = Path(self._recipe.run.dir) / "latents" / str(facts.get("step", "")) / facts["weights"]
                path.mkdir(parents=True, exist_ok=True)
                torch.save(video, path / take.name)
        return found


def train_and_keep_latents(recipe_path: Path, overrides: Sequence[str] = ()) -> State:
    trainer.TrainingSamples = KeepsLatents  # type: ignore[misc]
    return train(recipe_path, overrides)


def run_dir(recipe_path: Path) -> Path:
    return recipe_path.parent / "run"


def latents_of(recipe_path: Path) -> dict[str, Tensor]:
    folder = run_dir(recipe_path) / "latents"
    return {str(path.relative_to(folder)): torch.load(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def encoded(source: Source) -> Prompts:
    return encode(encoders_of(source.recipe, source.model, ""), [Prompt(caption) for caption in CAPTIONS], "cpu", "")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, write_recipe) -> tuple[Path, State]:
    """A recipe, and the state after it was trained and sampled on one rank."""
    recipe_path = write_recipe(tmp_path_factory.mktemp("sampled"))
    return recipe_path, run_ranks(1, train_and_keep_latents, recipe_path, SAMPLE)[0]


def test_each_prompt_and_seed_is_a_video_at_the_start_every_few_steps_and_at_the_end(
    sampled: tuple[Path, State],
) -> None:
    folder = run_dir(sampled[0]) / "samples"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-00000000", "step-00000002", "step-00000003", "teacher"
    ]  # fmt: skip
    for which in ("step-00000002/generator", "step-00000002/generator.ema", "teacher"):
        names = {path.name for path in (folder / which).iterdir()}
        assert names == {"videos.json", "sheet.gif", *(f"{name}.gif" for name in NAMES)}
        with Image.open(folder / which / "0002-seed-7.gif") as picture:
            assert (picture.n_frames, picture.size) == (3, (8, 8))
    index = json.loads((folder / "step-00000002/generator.ema/videos.json").read_text())
    assert (index["step"], index["weights"], index["steps"], index["shift"]) == (2, "generator.ema", 4, 5.0)
    assert index["videos"][2] == {
        "files": ["0002-seed-7.gif"], "prompt_number": 2, "prompt": CAPTIONS[2], "seed": 7
    }  # fmt: skip


@pytest.mark.parametrize("which", ["generator", "generator.ema"])
def test_they_are_those_of_the_step_s_checkpoint(sampled: tuple[Path, State], which: Any) -> None:
    source, device = open_source(run_dir(sampled[0]) / "checkpoints/step-00000002"), torch.device("cpu")
    prompts = encoded(source)
    found = latents_of(sampled[0])
    videos = sample_videos(
        source.network(which, device), prompts, (3, 3, 8, 8), num_steps=4, shift=5.0, seed=SEED, batch_size=1
    )
    for name, video in zip(NAMES, videos, strict=True):
        assert (found[f"2/{which}/{name}"] - video).abs().max() < 1e-5
    assert (found["2/generator/0000-seed-7"] - found["2/generator.ema/0000-seed-7"]).abs().max() > 1e-4
    assert torch.equal(found["0/generator/0000-seed-7"], found["0/generator.ema/0000-seed-7"]), "the average begins so"


def test_the_teacher_s_are_guided(sampled: tuple[Path, State]) -> None:
    source = open_source(run_dir(sampled[0]))
    videos = sample_videos(
        source.teacher(torch.device("cpu")), encoded(source), (3, 3, 8, 8), num_steps=2, shift=5.0,
        seed=7, guidance_scale=3.0,
    )  # fmt: skip
    assert (latents_of(sampled[0])["teacher/0001-seed-7"] - videos[1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "overrides",
    [[], ["parallel.ring=2", "parallel.reshard_after_forward=false"]],
    ids=["a part each", "both share every video, blocks stay gathered"],
)
def test_two_ranks_make_the_same_videos(
    recipe_path: Path, sampled: tuple[Path, State], overrides: Sequence[str]
) -> None:
    """Three videos: where each rank makes its own, the second repeats one that it does not write."""
    state = run_ranks(2, train_and_keep_latents, recipe_path, [*SAMPLE, *overrides])[0]
    expected, found = latents_of(sampled[0]), latents_of(recipe_path)
    assert len(found) == 3 * 2 * 3 + 3 and found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-5
    assert parameter_difference(state, sampled[1]) < 1e-6
    files = [sorted(path.name for path in (run_dir(where) / "samples").rglob("*")) for where in (recipe_path, sampled[0])]
    assert files[0] == files[1]


def test_to_sample_changes_nothing_of_the_training(recipe_path: Path, sampled: tuple[Path, State]) -> None:
    unsampled = run_ranks(1, train, recipe_path, ["run.steps=3"])[0]
    assert set(max_difference(unsampled, sampled[1]).values()) == {0.0}
    assert not (run_dir(recipe_path) / "samples").exists()


def test_tensorboard_shows_them_in_motion(sampled: tuple[Path, State]) -> None:
    events = EventAccumulator(str(run_dir(sampled[0]) / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples/generator.ema")] == [0, 2, 3]
    assert [event.step for event in events.Images("samples/teacher")] == [0]
    assert events.Images("samples/generator")[1].encoded_image_string.startswith(b"GIF89a")


def test_the_vae_decodes_them_and_the_teacher_s_are_taken_once(
    recipe_path: Path, wan_folder: Path, video_pipeline: Path, tmp_path: Path
) -> None:
    """Two ranks and a LoRA run."""
    folder = tmp_path / "with_vae"
    shutil.copytree(wan_folder, folder)
    shutil.copytree(video_pipeline / "vae", folder / "vae")
    words = [
        f"model.pretrained={folder}",
        "model.generator.lora.rank=2",
        "model.fake_score.lora.rank=2",
        f"samples={{every: 1, prompts: [{CAPTIONS[0]}], seeds: [0, 3], formats: [mp4, gif], teacher: true, teacher_steps: 1}}",
    ]
    run_ranks(2, train, recipe_path, [*words, "run.steps=1"])
    samples = run_dir(recipe_path) / "samples"
    with Image.open(samples / "step-00000001/generator.ema/0000-seed-0.gif") as picture:
        assert (picture.n_frames, picture.size) == (9, (64, 64))
    teacher = samples / "teacher/0000-seed-3.mp4"
    taken = teacher.stat().st_mtime_ns
    run_ranks(2, train, recipe_path, [*words, "run.steps=2"])
    assert (samples / "step-00000002/generator/0000-seed-0.mp4").is_file()
    assert teacher.stat().st_mtime_ns == taken


def test_training_goes_on_where_a_video_cannot_be_written(recipe_path: Path) -> None:
    folder = run_dir(recipe_path) / "samples/step-00000001"
    (folder / "generator" / f"{NAMES[1]}.gif").mkdir(parents=True)
    run_ranks(1, train, recipe_path, ["run.steps=1", f"samples={{{TO_SAMPLE}}}"])
    assert (run_dir(recipe_path) / "checkpoints/step-00000001").is_dir()
    indexes = sorted(str(path.relative_to(folder)) for path in folder.rglob("videos.json"))
    assert indexes == ["generator.ema/videos.json"], "an index tells that its videos are there"


def test_training_goes_on_where_the_vae_cannot_be_read(recipe_path: Path, wan_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with_vae"
    shutil.copytree(wan_folder, folder)
    (folder / "vae").mkdir()
    words = ["run.steps=1", f"model.pretrained={folder}", f"samples={{{TO_SAMPLE}}}"]
    run_ranks(1, train, recipe_path, words)
    assert (run_dir(recipe_path) / "checkpoints/step-00000001").is_dir()
    assert not (run_dir(recipe_path) / "samples").exists()


def train_without_memory_on_rank_1(recipe_path: Path) -> None:
    errors = iter([torch.OutOfMemoryError("CUDA out of memory"), *[RuntimeError("unable to find an engine")] * 3])
    decoder = training_samples.decoder

    def fail(*arguments: Any) -> Any:
        if dist.get_rank() == 1:
            raise next(errors)
        return decoder(*arguments)

    training_samples.decoder = fail
    train(recipe_path, ["run.steps=1", f"samples={{{TO_SAMPLE}}}"])


def test_training_goes_on_where_one_rank_cannot_decode_its_videos(recipe_path: Path) -> None:
    run_ranks(2, train_without_memory_on_rank_1, recipe_path)
    assert (run_dir(recipe_path) / "checkpoints/step-00000001").is_dir()
    names = [path.name for path in (run_dir(recipe_path) / "samples").rglob("*") if path.is_file()]
    assert set(names) == {f"{NAMES[0]}.gif", f"{NAMES[2]}.gif"} and len(names) == 2 * 4


def sample_until_stopped(recipe_path: Path) -> None:
    """On rank 1 the prompts' file is another."""
    if os.environ["RANK"] == "1":
        training_samples.prompts_of = lambda section: [Prompt("a square")] * 9
    train_until_stopped(recipe_path, SAMPLE)


def test_a_run_that_is_asked_to_stop_saves_at_once_and_takes_them_when_it_is_resumed(
    recipe_path: Path, sampled: tuple[Path, State]
) -> None:
    """The prompts are those of rank 0."""
    run_ranks(2, sample_until_stopped, recipe_path)
    assert (run_dir(recipe_path) / "checkpoints/step-00000002").is_dir()
    samples = run_dir(recipe_path) / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["step-00000000", "teacher"]
    run_ranks(2, train_and_keep_latents, recipe_path, SAMPLE)
    expected, found = latents_of(sampled[0]), latents_of(recipe_path)
    assert {name.split("/")[0] for name in found} == {"2", "3"}
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-5
