"""`launch/prepare.py videos` as a user runs it: on two ranks, killed in the middle, called again, trained on."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from commands import REPO, run_forked

from sgmd_dist import preflight
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.record import sidecar_record
from sgmd_dist.data.verify import verify
from sgmd_dist.recipe_file import load_recipe

NUM_CLIPS = 40
SHAPES = [(32, 48), (48, 32), (40, 40)]  # height, width
BROKEN = 17
TORCHRUN = f"{sys.executable} -m torch.distributed.run --nproc-per-node=2"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, clips: Callable[..., None]) -> Path:
    """40 clips of 3 shapes, one of them junk."""
    folder = tmp_path_factory.mktemp("clips")
    with (folder / "manifest.jsonl").open("w") as file:
        for number in range(NUM_CLIPS):
            height, width = SHAPES[number % 3]
            name = f"{number:02d}{'.webm' if number % 8 == 0 else '.mp4'}"
            clips(folder / name, 14 + number % 5, height=height, width=width)
            file.write(json.dumps({"video": name, "caption": f"a red ball moving {'left' if number % 2 else 'up'}"}))
            file.write("\n")
    (folder / f"{BROKEN}.mp4").write_bytes(b"no video at all")
    return folder / "manifest.jsonl"


def keys_of_whole_shards(out: Path) -> list[str]:
    return [key for tar in out.glob("*.tar") if tar.with_suffix(".index.json").exists() for key in keys(tar)]


def keys(tar: Path) -> list[str]:
    return sidecar_record(tar).keys


def kill_when(command: str, condition: Callable[[], bool], log: Path) -> None:
    """Start a torchrun; as soon as `condition` holds, SIGKILL it and its ranks, which have sessions of their own, and
    wait until they are gone."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            shlex.split(command), cwd=REPO, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            end = time.monotonic() + 240
            while not condition():
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
            while left := processes_of(command):
                for rank in left:
                    with suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGKILL)
                time.sleep(0.005)


def processes_of(command: str) -> list[int]:
    """The processes that run the script of a torchrun with its arguments."""
    script = "\0".join(shlex.split(command.removeprefix(TORCHRUN))).encode()
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal() and script in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def test_killed_on_two_ranks_called_again_and_trained_on(tmp_path: Path, manifest: Path, video_pipeline: Path) -> None:
    out = tmp_path / "out"
    command = (
        f"{TORCHRUN} {REPO}/launch/prepare.py videos {manifest} {out} --pretrained {video_pipeline}"
        " --buckets 13x32x48,13x48x32,13x32x32 --shard-megabytes 0.002"
    )
    kill_when(command, lambda: len(keys_of_whole_shards(out)) >= 4, tmp_path / "log")
    before = {tar.name: tar.read_bytes() for tar in out.glob("*.tar")}
    assert len(before) >= 2 and len(keys_of_whole_shards(out)) < NUM_CLIPS - 1
    assert not (out / "index.json").exists()

    done = run_forked(command.replace(f"{TORCHRUN} {REPO}/", "torchrun --nproc-per-node=2 "))
    assert done.code == 0, done.output
    assert f"{NUM_CLIPS} rows: {NUM_CLIPS - 1} encoded, 1 skipped (skipped.jsonl)" in done.output
    [broken] = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert (broken["row"], broken["video"]) == (BROKEN, f"{BROKEN}.mp4") and "Invalid data" in broken["reason"]

    index = ShardIndex.open(out)
    assert sorted(index.keys) == [f"{number:08d}" for number in range(NUM_CLIPS) if number != BROKEN]
    assert {tar.name: tar.read_bytes() for tar in out.glob("*.tar")}.items() >= before.items()
    assert not list(out.glob("*.tmp"))
    assert {name: index.latent_shape(name)[1:] for name in index.buckets} == {
        "13x32x32": (4, 4, 4),
        "13x32x48": (4, 4, 6),
        "13x48x32": (4, 6, 4),
    }
    by_shape = [sum(number % 3 == shape and number != BROKEN for number in range(NUM_CLIPS)) for shape in range(3)]
    assert np.bincount(index.bucket).tolist() == [by_shape[2], by_shape[0], by_shape[1]]

    report = verify([str(out)])
    assert report.mistakes == [] and sum(report.samples.values()) == NUM_CLIPS - 1

    trained = run_forked(
        f"python launch/train.py recipes/tiny_sgmd.yaml data.shards={out} run.dir={tmp_path}/run"
        " run.steps=3 run.log_every=1 data.global_batch_size=4 data.micro_batch_size=2 data.lanes=2"
    )
    assert trained.code == 0, trained.output
    assert (tmp_path / "run/checkpoints/step-00000003").is_dir()


def prepare(monkeypatch: pytest.MonkeyPatch, arguments: str) -> int:
    """What launch/prepare.py does, in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["launch/prepare.py", *shlex.split(arguments)])
    monkeypatch.chdir(REPO)
    with pytest.raises(SystemExit) as end:
        runpy.run_path("launch/prepare.py", run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_bucket_that_is_none_is_exit_code_2(
    tmp_path: Path,
    manifest: Path,
    video_pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = f"videos {manifest} {tmp_path}/out --pretrained {video_pipeline} --buckets 12x32x48"
    assert prepare(monkeypatch, arguments) == 2
    message = "error: --buckets: 12x32x48: 12 frames: the VAE takes 4n + 1; use 9 or 13"
    assert message in capfd.readouterr().err.splitlines()
    assert not (tmp_path / "out").exists()


def test_prompts_become_shards_that_training_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball moving left\na green bar moving up\n" * 8)
    arguments = f"prompts {tmp_path}/prompts.txt {tmp_path}/out --pretrained recipes/tiny_wan --video 8 12 12"
    assert prepare(monkeypatch, arguments) == 0
    assert "16 rows: 16 encoded, 0 skipped; " in capfd.readouterr().out
    index = ShardIndex.open(tmp_path / "out")
    assert index.num_samples == 16 and index.latent_shape(0) == (3, 8, 12, 12) and not index.has_latents(0)
    recipe = load_recipe("recipes/tiny_sgmd.yaml", [f"data.shards={tmp_path}/out"])
    assert preflight.check(recipe, recipe.layout(1))
