"""Every command of the README works: run here in its order, shortened, below a temporary folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from commands import Done, run, run_forked
from diffusers import WanPipeline
from pages import page
from PIL import Image

TRAIN = "torchrun --nproc-per-node=2 launch/train.py recipes/tiny_sgmd.yaml"
RESUME = f"{TRAIN} run.steps=120"
SHARED = (
    "torchrun --nproc-per-node=4 launch/train.py recipes/tiny_sgmd.yaml parallel.ulysses=2 parallel.ring=2 run.steps=10"
    " run.dir=runs/tiny_shared"
)
BENCH_STEP = "python launch/bench.py step recipes/tiny_sgmd.yaml run.dir=runs/bench --out runs/step.json"
LORA = (
    "torchrun --nproc-per-node=2 launch/train.py recipes/tiny_sgmd.yaml model.generator.lora.rank=8"
    " model.fake_score.lora.rank=8 run.dir=runs/tiny_lora"
)
EVALUATE = "python launch/evaluate.py runs/tiny_sgmd --repeats 1 --teacher-steps 10"
TEACHER = "torchrun --nproc-per-node=2 launch/train.py recipes/tiny_teacher.yaml"

DRY_RUN = "python launch/train.py recipes/tiny_sgmd.yaml --dry-run --world-size 2"
SMALL = "data.global_batch_size=2 data.micro_batch_size=1"

# What makes a command short, or keeps it below {runs}.
SHORTER = {
    "make demo": f'DEMO={{runs}}/demo TRAIN_ARGS="run.steps=3 {SMALL}" EVALUATE_ARGS="--repeats 1 --teacher-steps 2"',
    "python launch/prepare.py world runs/world --num-samples 512": "--num-samples 64",
    DRY_RUN: SMALL,
    TRAIN: f"run.dir={{runs}}/tiny_sgmd run.steps=2 run.log_every=2 {SMALL}",
    RESUME: f"run.dir={{runs}}/tiny_sgmd run.steps=4 run.log_every=2 {SMALL}",
    SHARED: f"run.steps=2 {SMALL}",
    BENCH_STEP: f"--steps 1 {SMALL}",
    EVALUATE: "--teacher-steps 2",
    LORA: f"run.steps=2 {SMALL}",
    TEACHER: f"run.dir={{runs}}/tiny_teacher run.steps=2 {SMALL}",
}
NOT_RUN = {
    "make test": "runs this test",
    "make install": "has run",
    ". .venv/bin/activate": "stands in PATH",
    "torchrun --nnodes=8": "needs 8 nodes",
    "sbatch ": "needs a cluster; test_slurm.py makes one",
    "torchrun --nproc-per-node=8 launch/prepare.py videos": "needs a model; test_prepare_videos.py makes one",
    "tensorboard --logdir runs": "serves until it is stopped",
}


def readme_commands() -> list[str]:
    return page("README.md").commands()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def journey(runs: Path) -> dict[str, Done]:
    """All commands in the README's order, with what became of them. `make demo` shows that torchrun and python start
    the scripts of launch; after it they are forked."""
    done = {}
    for command in readme_commands():
        if not any(command.startswith(prefix) for prefix in NOT_RUN):
            shorter = SHORTER.get(command, "").replace("{runs}", str(runs))
            forked = re.match(r"(python|torchrun).*? launch/\w+\.py", command) is not None
            done[command] = (run_forked if forked else run)(f"{command.replace('runs/', f'{runs}/')} {shorter}")
    return done


def test_the_readme_begins_with_its_two_commands() -> None:
    assert readme_commands()[:2] == ["make demo", "make test"]
    assert set(SHORTER) <= set(readme_commands())


def test_every_command_succeeds_or_fails_as_the_readme_says(journey: dict[str, Done]) -> None:
    for command, done in journey.items():
        expected = 2 if command == "python launch/train.py recipes/sgmd.yaml --check" else 0
        assert done.code == expected, f"{command}\n{done.output}"


def test_the_demo_leaves_scores_and_pictures_and_prints_the_table(journey: dict[str, Done], runs: Path) -> None:
    scores = json.loads((runs / "demo/scores.json").read_text())
    assert list(scores) == ["before", "after", "teacher"]
    for name, row in scores.items():
        assert {"swd", "motion_ratio", "jitter"} <= set(row)
        assert re.search(rf"^{name} +{row['swd']:.3f} ", journey["make demo"].output, re.MULTILINE)
    with Image.open(runs / "demo/samples.gif") as picture:
        assert picture.n_frames == 8


def test_a_second_call_with_more_steps_resumes_where_the_first_ended(journey: dict[str, Done], runs: Path) -> None:
    assert "resumed" not in journey[TRAIN].output
    assert re.search(r"resumed .*step-00000002 at step 2", journey[RESUME].output)
    lines = (runs / "tiny_sgmd/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert (runs / "tiny_sgmd/checkpoints/step-00000004").is_dir()
    assert yaml.safe_load((runs / "tiny_sgmd/recipe.yaml").read_text())["run"]["steps"] == 4


def test_sampling_writes_one_video_per_prompt_and_seed(journey: dict[str, Done], runs: Path) -> None:
    names = [f"{number:04d}-seed-{seed}.gif" for number in (0, 1) for seed in (0, 1)]
    assert sorted(path.name for path in (runs / "videos").iterdir()) == [*names, "sheet.png", "videos.json"]
    with Image.open(runs / "videos/0001-seed-0.gif") as picture:
        assert picture.n_frames == 8


def test_the_export_loads_in_diffusers(journey: dict[str, Done]) -> None:
    (command,) = (command for command in journey if command.startswith("python -c"))
    assert journey[command].output.split() == ["4"], "layers of the tiny Wan"


def test_the_pipeline_is_a_stock_one_with_the_trained_steps(journey: dict[str, Done], runs: Path) -> None:
    pipe = WanPipeline.from_pretrained(runs / "tiny_sgmd/pipeline", vae=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 96, "width": 96, "num_frames": 29}  # latents 12 x 12 x 8, as no VAE says otherwise
    videos = pipe("a red ball moving left", num_inference_steps=4, guidance_scale=1.0, output_type="latent", **size)
    assert videos.frames.shape == (1, 3, 8, 12, 12) and bool(videos.frames.isfinite().all())
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9375, 5 / 6, 0.625, 0.0], abs=1e-6)
