"""launch/evaluate.py on a run of one step: the same scores on any ranks, a protocol that binds, files that others read."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import pytest
import torch
from commands import Done, run_forked
from PIL import Image
from ranks import run_ranks
from running import train

from sgmd_dist.evaluation import score
from sgmd_dist.prompts import Prompt, encode, encoders_of
from sgmd_dist.sampling import open_source, sample_videos

NUM_BLOCKS = 1  # of the network: the run around it is what is tested
PROMPTS = ("a red ball moving left", "a blue bar / moving up", "a green pillar moving down")
TIMED = "seconds_per_video"
Json = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[[Path], Path]) -> Path:
    """A folder with a run of one step in `run`, and prompts."""
    folder = tmp_path_factory.mktemp("evaluated")
    run_ranks(1, train, write_recipe(folder), ["run.steps=1"])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def evaluate(folder: Path, out: str, *options: str, ranks: int = 0) -> Done:
    program = f"torchrun --nproc-per-node={ranks}" if ranks else "python"
    fixed = f"--prompts {folder}/prompts.txt --repeats 2 --teacher-steps 3 --batch-size 2 --out {folder}/{out}"
    return run_forked(f"{program} launch/evaluate.py {folder}/run {fixed} {' '.join(options)}")


def read(folder: Path, name: str) -> Json:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def alone(folder: Path) -> Done:
    return evaluate(folder, "alone")


def test_it_leaves_scores_protocol_pictures_and_report(alone: Done, folder: Path) -> None:
    assert alone.code == 0, alone.output
    scores = read(folder, "alone/scores.json")
    assert list(scores) == ["before", "after", "teacher"]
    assert all({"swd", "motion_ratio", "jitter", "swd_real", "energy_real"} <= set(row) for row in scores.values())
    assert [row["passes_per_video"] for row in scores.values()] == [4, 4, 2 * 3]
    with Image.open(folder / "alone/samples.gif") as picture, av.open(str(folder / "alone/samples.mp4")) as video:
        assert picture.n_frames == 3 and sum(1 for _ in video.decode(video=0)) == 3  # type: ignore[attr-defined]
        assert video.streams.video[0].codec_context.pix_fmt == "yuv420p"
    page = (folder / "alone/report.html").read_text()
    assert page.count("<video") == len(PROMPTS) and "a blue bar / moving up" in page
    assert page.count("<svg") >= 4, "curves of the run"


def test_scores_are_of_every_repeat_of_every_prompt(alone: Done, folder: Path) -> None:
    """Of videos that are sampled in one batch here."""
    source, cpu = open_source(folder / "run"), torch.device("cpu")
    encoded = encode(encoders_of(source.recipe, source.model, ""), [Prompt(caption) for caption in PROMPTS], cpu, "")
    sample = partial(sample_videos, prompts=encoded.repeated(2), latent_shape=(3, 3, 8, 8), shift=5.0)
    reference = sample(source.teacher(cpu), num_steps=3, seed=1, guidance_scale=3.0)
    teacher = sample(source.teacher(cpu), num_steps=3, seed=2, guidance_scale=3.0)
    after = sample(source.network("generator", cpu), num_steps=4, seed=2)
    found = read(folder, "alone/scores.json")
    for name, videos in (("teacher", teacher), ("after", after)):
        expected = score(videos, reference).as_dict()
        assert {key: found[name][key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_protocol_says_what_was_measured_and_of_what(alone: Done, folder: Path) -> None:
    stored = read(folder, "alone/protocol.json")
    protocol, evaluated = stored["protocol"], stored["evaluated"]
    assert protocol["prompts"] == list(PROMPTS) and protocol["repeats"] == 2 and protocol["num_real"] == 6
    assert (protocol["teacher_steps"], protocol["student_steps"], protocol["guidance_scale"]) == (3, 4, 3.0)
    assert (protocol["reference_seed"], protocol["sample_seed"]) == (1, 2)
    assert (evaluated["step"], evaluated["which"], evaluated["checkpoint"]) == (1, "generator", "step-00000001")
    assert len(str(evaluated["checkpoint_sha256"])) == len(str(protocol["teacher"])) == 64


def test_two_ranks_find_the_same_scores_and_are_set_beside_the_first(alone: Done, folder: Path) -> None:
    done = evaluate(folder, "shared", f"--against {folder}/alone", ranks=2)
    assert done.code == 0, done.output
    scores, others = read(folder, "shared/scores.json"), read(folder, "alone/scores.json")
    for row in (*scores.values(), *others.values()):
        assert float(str(row.pop(TIMED))) > 0
    assert scores == others
    assert read(folder, "shared/protocol.json")["protocol"] == read(folder, "alone/protocol.json")["protocol"]
    rows = [line.split("  ")[0] for line in done.output.splitlines()]
    assert [row for row in rows if row.startswith("after")] == ["after", "after, against"] * 2


def test_scores_of_another_protocol_are_refused_before_anything_is_sampled(alone: Done, folder: Path) -> None:
    done = evaluate(folder, "other", f"--against {folder}/alone/scores.json --repeats 3 --real none")
    assert done.code == 2 and "videos per row" not in done.output
    (error,) = done.errors()
    assert "repeats = 3 here, 2 there" in error and "real = null here" in error and "teacher_steps" not in error


def test_real_videos_are_those_that_are_named(folder: Path, shards: Path) -> None:
    (folder / "nothing").mkdir(exist_ok=True)
    done = evaluate(folder, "other", f"--real {folder}/nothing")
    assert done.code == 2 and len(done.errors()) == 1 and "nothing" in done.errors()[0], done.output
    done = evaluate(folder, "other", "--real none --ema --repeats 1 --teacher-steps 1")
    assert done.code == 0, done.output
    assert "swd_real" not in read(folder, "other/scores.json")["after"]
    assert read(folder, "other/protocol.json")["evaluated"]["which"] == "generator.ema"


def test_images_of_prompts_are_nothing_to_a_text_to_video_run(folder: Path) -> None:
    """Not even looked for."""
    (folder / "prompts.jsonl").write_text(json.dumps({"caption": PROMPTS[0], "image": "gone.png"}))
    fixed = f"--prompts {folder}/prompts.jsonl --real none --repeats 1 --teacher-steps 1 --out {folder}/objects"
    done = run_forked(f"python launch/evaluate.py {folder}/run {fixed}")
    assert done.code == 0, done.output
    protocol = read(folder, "objects/protocol.json")["protocol"]
    assert (protocol["prompts"], protocol["images"], protocol["image_encoders"]) == ([PROMPTS[0]], None, None)


def test_vbench_finds_its_layout_or_the_user_the_command(folder: Path) -> None:
    where = folder / "for vbench"
    call = f"--vbench '{where}' --vbench-videos 2 --vbench-dimensions color scene --vbench-standard"
    done = evaluate(folder, "unused", call, ranks=2)
    assert done.code == 0, done.output
    assert "6 videos, 6 of them new" in done.output
    assert f"--videos_path '{where}/videos'" in done.output and "--dimension color scene" in done.output
    told = read(where, "prompts.json")
    assert sorted(told) == sorted(path.name for path in (where / "videos").iterdir())
    assert {str(prompt) for prompt in told.values()} == set(PROMPTS)
    for name in told:
        with av.open(str(where / "videos" / name)) as video:
            assert sum(1 for _ in video.decode(video=0)) == 3


def test_videos_that_are_there_stay_and_others_are_not_mixed_in(folder: Path) -> None:
    where = folder / "again"
    call = f"--vbench {where} --vbench-videos 1"
    assert "3 videos, 3 of them new" in evaluate(folder, "unused", call).output
    (gone, *_) = (where / "videos").glob("*pillar*")
    gone.unlink()
    assert "3 videos, 1 of them new" in evaluate(folder, "unused", call).output and gone.exists()
    done = evaluate(folder, "unused", call, "--ema")
    assert done.code == 2 and "other weights, prompts or settings" in done.errors()[0], done.output


@pytest.mark.parametrize(
    "options, message",
    [
        ("--out {folder}/prompts.txt", "--out {folder}/prompts.txt: {folder}/prompts.txt is no folder"),
        ("--vbench {folder}/prompts.txt/x", "--vbench {folder}/prompts.txt/x: {folder}/prompts.txt is no folder"),
        ("--vbench {folder}/damaged", "--vbench {folder}/damaged: holds videos of other weights"),
        ("--vbench {folder}/no --real none", "--vbench, --real: VBench's videos are made instead"),
        ("--vbench-standard", "--vbench-standard: is for VBench's videos; add --vbench FOLDER"),
    ],
)
def test_what_would_come_to_nothing_is_refused_before_anything_is_sampled(
    folder: Path, options: str, message: str
) -> None:
    (folder / "damaged").mkdir(exist_ok=True)
    (folder / "damaged/protocol.json").write_text("[]")
    done = evaluate(folder, "unused", options.format(folder=folder), ranks=2)
    assert done.code == 2 and "videos per row" not in done.output, done.output
    assert done.errors() == done.errors()[:1] * 2 and message.format(folder=folder) in done.errors()[0]
    assert not (folder / "no").exists()
