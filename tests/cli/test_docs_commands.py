"""Every block of docs that is marked as runnable: run here in its order, shortened, below a temporary folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import REPO, Done, run_forked
from pages import page, pages

TRAIN = "torchrun --nproc-per-node=2 launch/train.py recipes/tiny_videos.yaml"
KILLED = f"timeout 20 {TRAIN}"
EVALUATE = "python launch/evaluate.py runs/tiny_videos/run --prompts runs/tiny_videos/prompts.txt --repeats 1"
FOLDERS = (
    "model.pretrained={runs}/tiny_videos/pipeline data.shards={runs}/tiny_videos/shards run.dir={runs}/tiny_videos/run"
)
SMALL = "data.global_batch_size=2 data.micro_batch_size=1"

# What makes a command short, or keeps it below {runs}.
SHORTER = {
    "python launch/prepare.py world-videos runs/tiny_videos": "--num-samples 4",
    "python launch/train.py recipes/tiny_videos.yaml --check --world-size 2": FOLDERS,
    "python launch/plan.py recipes/tiny_videos.yaml --nodes 1 --gpus-per-node 2 --gpu-memory 80": FOLDERS,
    KILLED: f"{FOLDERS} {SMALL} run.steps=1000 checkpoint.every=2",
    TRAIN: f"{FOLDERS} {SMALL} run.steps=12",
    EVALUATE: "--teacher-steps 2 --prompts {runs}/one.txt",
}
Outcome = Done | dict[str, Any]  # of a command, or the names that a block of Python leaves


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "one.txt").write_text("a red ball moving left\n")
    return folder


@pytest.fixture(scope="module")
def outcomes(runs: Path) -> dict[str, dict[str, Outcome]]:
    """By page, what became of its commands, but of those of the README, which test_readme.py runs."""
    readme = set(page("README.md").commands())
    return {
        one.name: {block: outcome(block, runs) for block in one.runnable() if block not in readme}
        for one in pages()
        if one.runnable()
    }


def outcome(block: str, runs: Path) -> Outcome:
    here = block.replace("runs/", f"{runs}/")
    if "\n" in block:
        names: dict[str, Any] = {}
        exec(compile(here, "a page", "exec"), names)
        return names
    shorter = SHORTER.get(block, "").replace("{runs}", str(runs))
    command = re.sub(r"^timeout \d+ ", "", here)
    return run_forked(f"{command} {shorter}", kill_when=saved(runs / "tiny_videos/run") if block == KILLED else None)


def saved(run_dir: Path) -> Callable[[], bool]:
    """Whether the run has a checkpoint."""
    return lambda: any((run_dir / "checkpoints").glob("step-????????"))


def test_what_is_shortened_is_there() -> None:
    assert set(SHORTER) <= {block for one in pages() for block in one.runnable()}


def test_every_command_succeeds(outcomes: dict[str, dict[str, Outcome]]) -> None:
    for name, blocks in outcomes.items():
        for block, done in blocks.items():
            if isinstance(done, Done) and block != KILLED:
                assert done.code == 0, f"{name}: {block}\n{done.output}"


def test_the_killed_run_goes_on_where_it_was(outcomes: dict[str, dict[str, Outcome]], runs: Path) -> None:
    blocks = outcomes["docs/quickstart.md"]
    first, second = blocks[KILLED], blocks[TRAIN]
    assert isinstance(first, Done) and isinstance(second, Done)
    assert first.code == -9 and "resumed" not in first.output
    assert re.search(r"resumed .*step-\d+ at step \d+", second.output)
    assert (runs / "tiny_videos/run/checkpoints/step-00000012").is_dir()


def test_diffusers_makes_a_video_of_the_prompt_from_the_export(outcomes: dict[str, dict[str, Outcome]]) -> None:
    """The whole way from mp4 files; the shape is red, in at least a twentieth of the pixels, and it moves."""
    [names] = [done for done in outcomes["docs/quickstart.md"].values() if isinstance(done, dict)]
    video = np.asarray(names["videos"][0])
    assert video.shape == (29, 96, 96, 3) and video.min() >= 0 and video.max() <= 1
    red = (video[..., 0] - video[..., 1] > 0.2) & (video[..., 0] - video[..., 2] > 0.2)
    assert red.mean() > 0.05
    assert np.mean(red[0] != red[-1]) > 0.02


def test_the_samples_of_the_run_are_videos(outcomes: dict[str, dict[str, Outcome]], runs: Path) -> None:
    import av

    [path] = (runs / "tiny_videos/samples").glob("*.mp4")
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 29 and frames[0].shape == (96, 96, 3)
    assert REPO not in path.parents
