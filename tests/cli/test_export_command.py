"""launch/export.py on runs that were trained: every form, what each says, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Done, run_forked, run_in_turn
from diffusers import WanPipeline, WanTransformer3DModel
from forking import context
from safetensors.torch import load_file
from torch import Tensor

from sgmd_dist.export import write_verified
from sgmd_dist.rollout import guided, sample
from sgmd_dist.sampling import open_source

TRAIN = (
    "python launch/train.py recipes/tiny_sgmd.yaml run.steps=2 data.global_batch_size=4 optim.ema.decay=0.5"
    " optim.generator.lr=1e-3 run.dir={run}"
)
LORA = "model.generator.lora.rank=4 model.fake_score.lora.rank=4 'data.video={num_frames: 8, height: 12, width: 12}'"
Export = Callable[[str, str], Done]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`full` and `lora`, trained; `full` evaluated too."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("full", ""), ("lora", LORA)):
        done = run_forked(f"{TRAIN.format(run=folder / name)} {more}")
        assert done.code == 0, done.output
    (folder / "full/scores.json").write_text('{"before": {"swd": 0.25}, "after": {"swd": 0.125, "note": "x"}}')
    evaluated = {"which": "generator", "checkpoint": "step-00000002"}
    (folder / "full/protocol.json").write_text(json.dumps({"protocol": {}, "evaluated": evaluated}))
    return folder


@pytest.fixture
def export(runs: Path, tmp_path: Path) -> Export:
    """Export a run with options to `tmp_path`/out."""
    return lambda run, options: run_forked(f"python launch/export.py {runs / run} {tmp_path / 'out'} {options}")


def clip() -> tuple[Tensor, Tensor]:
    """Noise and a text, as the tiny model takes them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 6, 6, generator=generator), torch.randn(2, 8, 32, generator=generator)


def pipeline_latents(folder: Path) -> Tensor:
    noise, embeds = clip()
    pipe: Any = WanPipeline.from_pretrained(folder, vae=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=embeds, latents=noise, num_frames=13, height=48, width=48, num_inference_steps=4,
        guidance_scale=1.0, output_type="latent",
    ).frames  # fmt: skip


def our_latents(run: Path, which: Any) -> Tensor:
    noise, embeds = clip()
    source = open_source(run)
    return sample(guided(source.network(which, torch.device("cpu")), embeds, embeds[:1], 1.0), noise, *source.few_steps)


@pytest.mark.parametrize(
    "run, options, which",
    [
        ("full", "--pipeline", "generator"),
        ("full", "--pipeline --ema", "generator.ema"),
        ("lora", "--pipeline --merge", "generator"),
    ],
)
def test_the_stock_pipeline_gives_the_latents_of_our_sampler(
    export: Export, runs: Path, tmp_path: Path, run: str, options: str, which: str
) -> None:
    done = export(run, options)
    assert done.code == 0 and "in a pipeline of" in done.output, done.output
    found = pipeline_latents(tmp_path / "out")
    other = "generator" if which == "generator.ema" else "generator.ema"
    assert (found - our_latents(runs / run, which)).abs().max() < 1e-5
    assert (found - our_latents(runs / run, other)).abs().max() > 1e-4, "the weights that were asked for"
    call = (tmp_path / "out/README.md").read_text().partition("pipe(prompt, ")[2]
    assert call.startswith("num_frames=8, height=12, width=12, num_inference" if run == "lora" else "num_inference")


def test_the_card_tells_everything(export: Export, runs: Path, tmp_path: Path) -> None:
    assert export("full", "--dtype bfloat16 --max-shard-size 500KB").code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    card = (tmp_path / "out/README.md").read_text()
    for line in (
        *("| run | tiny_sgmd |", "| step | 2 |", "| weights | generator |", "| dtype | bfloat16 |"),
        *("| began from | recipes/tiny_wan |", "| data | world:moving_shapes |", f"torch {torch.__version__}"),
        "4 Euler steps, at sigma 1, 0.9375, 0.8333, 0.625",
        "Scores of the run's last evaluation, of generator in step-00000002:",
        "| | swd |\n|---|---|\n| before | 0.250 |\n| after | 0.125 |\n",
    ):
        assert line in card
    saved = next((runs / "full/checkpoints").iterdir()) / "recipe.yaml"
    assert (tmp_path / "out/recipe.yaml").read_text() == saved.read_text()


def test_the_change_of_a_fine_tune_as_a_lora(export: Export, tmp_path: Path) -> None:
    done = export("full", "--svd-rank 4")
    assert done.code == 0 and "tensors of an adapter of rank 4" in done.output, done.output
    assert "of the change of 46 linear layers, squared, kept: 0." in done.output
    assert "left out, 0.0" in done.output and "biases" in done.output and "patch_embedding" in done.output
    found = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert len(found) == 92 and found["transformer.proj_out.lora_A.weight"].shape[0] == 4
    assert "| made of them | their change from the base, at rank 4 |" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    "run, options, files",
    [
        ("full", "--keys original", ["model.safetensors"]),
        ("full", "--keys original --svd-rank 2", ["lora.safetensors"]),
        ("lora", "", ["pytorch_lora_weights.safetensors"]),
        ("lora", "--keys original --dtype bfloat16", ["lora.safetensors"]),
        ("lora", "--keys original --merge", ["model.safetensors"]),
    ],
)
def test_forms_and_their_files(export: Export, tmp_path: Path, run: str, options: str, files: list[str]) -> None:
    done = export(run, options)
    assert done.code == 0 and done.output.endswith("verified by reloading\n"), done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", *files, "recipe.yaml"]


def test_options_that_contradict_one_another_are_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    wrong = {
        "full out --merge": "holds a whole network, no adapter",
        "lora out --svd-rank 4": "holds an adapter already; leave out --svd-rank",
        "lora out --pipeline": "add --merge to put it into the pipeline's transformer",
        "full out --pipeline --svd-rank 4": "a pipeline holds the whole transformer",
        "full out --pipeline --keys original": "a pipeline has diffusers' names",
        "full out --keys original --max-shard-size 1GB": "only diffusers' folders are split",
        "lora out --max-shard-size 1GB": "only diffusers' folders are split",
        "full out --max-shard-size 5": "5: expected a size such as 5GB or 500MB",
        "full out --svd-rank 0": "0: expected an integer >= 1",
        "full out --svd-rank 257": "--svd-rank 257: no linear layer of this model has a rank above",
        "full out --dtype float16": "invalid choice: 'float16'",
        "full taken": "taken: exists already; choose another folder or remove it",
    }
    commands = [
        f"python launch/export.py {runs / run} {tmp_path / out} {' '.join(options)}"
        for run, out, *options in (line.split() for line in wrong)
    ]
    for done, (line, message) in zip(run_in_turn(commands), wrong.items(), strict=True):
        assert done.code == 2 and message in done.output and "Traceback" not in done.output, (line, done.output)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_ranks_do_not_write_one_folder_together(runs: Path, tmp_path: Path) -> None:
    done = run_forked(f"torchrun --nproc-per-node=2 launch/export.py {runs / 'full'} {tmp_path / 'out'}")
    assert done.code == 2 and "start it with python, not torchrun" in done.errors()[0], done.output
    assert list(tmp_path.iterdir()) == []


def _export_until_killed(folder: Path) -> None:
    def read(_: Path) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    write_verified({}, folder, lambda aside: (aside / "config.json").write_text("half") and None, read, {})


def test_a_killed_export_leaves_no_folder_and_the_next_one_succeeds(export: Export, tmp_path: Path) -> None:
    process = context.Process(target=_export_until_killed, args=(tmp_path / "out",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.tmp"]
    assert export("full", "").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert WanTransformer3DModel.from_pretrained(tmp_path / "out", local_files_only=True).config.num_layers == 4


def test_scores_that_cannot_be_read_are_named(export: Export, runs: Path, tmp_path: Path) -> None:
    scores = runs / "lora/scores.json"
    scores.write_text('{"after": ')
    done = export("lora", "")
    scores.unlink()
    assert done.code == 2 and len(done.errors()) == 1, done.output
    assert "lora/scores.json: cannot be read (" in done.output and "remove the file" in done.output
    assert list(tmp_path.iterdir()) == []
