"""`--check` and the commands' errors: one message that names file, key, value and remedy, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from commands import run_forked


def test_a_missing_model_folder_is_one_message_that_names_the_key() -> None:
    done = run_forked("python launch/train.py recipes/sgmd.yaml --check")
    assert done.code == 2
    (error,) = done.output.strip().splitlines()
    assert "model.pretrained = 'models/Wan2.1-T2V-14B-Diffusers': no such folder" in error
    assert "set model.pretrained=PATH" in error


def test_a_local_model_folder_passes_and_the_plan_is_printed(local_wan: Path) -> None:
    model = f"model.pretrained={local_wan} model.config=null"
    done = run_forked(f"python launch/train.py recipes/sgmd.yaml --check --world-size 64 {model}")
    assert done.code == 0, done.output
    assert "ranks       64 = dp_replicate 1 x dp_shard 64 x ring 1 x ulysses 1" in done.output
    assert "batch       global 256 = micro 1 x data parallel 64 x accumulation 4" in done.output


def test_a_folder_of_another_architecture_than_the_recipe_s_is_refused(local_wan: Path) -> None:
    done = run_forked(f"python launch/train.py recipes/sgmd.yaml --check model.pretrained={local_wan}")
    assert done.code == 2
    assert "config.json has num_attention_heads = 2, expected model.config.num_attention_heads = 40" in done.output


def test_the_plan_explains_the_layout_of_a_sequence(local_wan: Path) -> None:
    """21 x 30 x 52 tokens of the shipped recipe on 16 ranks; 2 heads on 8 of them."""
    layout, model = (
        "--world-size 64 parallel.ulysses=8 parallel.ring=2",
        f"model.pretrained={local_wan} model.config=null",
    )
    done = run_forked(f"python launch/train.py recipes/sgmd.yaml --check {layout} {model}")
    assert done.code == 0, done.output
    assert "tokens      32760 of latents 16x21x60x104: 2048 per rank on 16, padding 0.02%" in done.output
    assert "2 heads: 1 per rank on 8, padding 75.00%" in done.output
    assert "exchange    sent by a rank in each of 1 blocks for a micro-batch: forward" in done.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("recipes/tiny_sgmd.yaml objective.nr_wieght=0.1", "nr_weight"),
        ("recipes/tiny_sgmd.yaml data.micro_batch_size=3", "micro_batch_size"),
        ("recipes/nowhere.yaml", "recipes/nowhere.yaml"),
        ("recipes/tiny_sgmd.yaml data.shards=world:moving_shape", "world:moving_shapes"),
        ("recipes/tiny_sgmd.yaml data.shards=/nowhere", "/nowhere"),
        ("recipes/tiny_sgmd.yaml model.pretrained=recipes", "transformer"),
        ("recipes/tiny_sgmd.yaml samples.prompts=nowhere.txt", "samples.prompts = 'nowhere.txt': no such file"),
        ("recipes/tiny_sgmd.yaml samples.prompts=[]", "samples.prompts"),
        ("recipes/tiny_sgmd.yaml samples.every=5", "samples.prompts"),
        ("recipes/tiny_sgmd.yaml samples.prompts=[a] samples.seeds=[1,1]", "expected each once"),
        ("recipes/tiny_sgmd.yaml samples.prompts=[a] data.text_encoder=recipes", "data.text_encoder = 'recipes'"),
        (
            "recipes/tiny_teacher.yaml samples.prompts=[a]",
            "objective.name = flow_matching trains no few-step generator",
        ),
        ("recipes/tiny_sgmd.yaml parallel.attention=cudnn", "parallel.attention = cudnn: needs float16 or bfloat16"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_starts(arguments: str, message: str) -> None:
    done = run_forked(f"python launch/train.py {arguments} --check")
    assert done.code == 2, done.output
    assert len(done.errors()) == 1 and message in done.errors()[0], done.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--world-size 3", "data.global_batch_size = 8 is not a multiple"),
        ("--world-size 2 --rank 2", "--rank 2: there are 2 ranks"),
        ("--world-size 2 model.pretrained=null", "model.config"),
    ],
)
def test_a_dry_run_that_cannot_be_is_refused(arguments: str, message: str) -> None:
    done = run_forked(f"python launch/train.py recipes/tiny_sgmd.yaml --dry-run {arguments}")
    assert done.code == 2, done.output
    assert len(done.errors()) == 1 and message in done.errors()[0], done.output


@pytest.mark.parametrize(
    "command, message",
    [
        ("python launch/sample.py {folder} --prompts x --out {folder}/out", "checkpoint"),
        ("python launch/evaluate.py {folder}", "checkpoint"),
        ("python launch/export.py {folder}/nowhere {folder}/out", "nowhere"),
        ("python launch/prepare.py world {folder}/world --text-encoder {folder}", "text_encoder"),
        ("python launch/prepare.py world {folder}/world --num-samples 0", "num_samples"),
    ],
)
def test_wrong_inputs_of_the_other_commands_are_one_message_too(command: str, message: str, tmp_path: Path) -> None:
    done = run_forked(command.format(folder=tmp_path))
    assert done.code == 2, done.output
    assert len(done.errors()) == 1 and message in done.errors()[0], done.output


def test_all_ranks_say_the_same_message(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"base": str(Path("recipes/tiny_sgmd.yaml").resolve()), "run": {"step": 3}}))
    done = run_forked(f"torchrun --nproc-per-node=2 launch/train.py {recipe}")
    assert done.code != 0
    (error,) = {line for line in done.output.splitlines() if line.startswith("error: ")}
    assert "mine.yaml: run.step = 3: unknown key" in error


def test_a_place_that_takes_no_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for words in (
        "bench.py kernels --out {}/taken/x.json",
        "prepare.py text-encoder {}/taken",
        "prepare.py world {}/taken",
    ):
        done = run_forked(f"python launch/{words.format(tmp_path)}")
        assert done.code == 2 and done.output == f"{done.errors()[0]}\n", done.output
        assert "choose another folder" in done.output
