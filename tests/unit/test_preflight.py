"""What `--check` finds before a GPU is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgmd_dist import preflight
from sgmd_dist.data.format import write_negative_prompt
from sgmd_dist.data.index import consolidate
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.errors import UserError
from sgmd_dist.recipe_file import load_recipe

ENCODER = Path(__file__).resolve().parents[2] / "recipes" / "tiny_wan"
RECIPE = f"""
run: {{name: checked, steps: 1}}
model:
  family: wan
  config: {{num_layers: 1, num_attention_heads: 2, attention_head_dim: 12, ffn_dim: 32, text_dim: 32, in_channels: 3,
    out_channels: 3}}
objective: {{name: sgmd}}
data: {{text_encoder: {ENCODER}, global_batch_size: 1}}
"""
VIDEO = "data.video={num_frames: 8, height: 12, width: 12}"
LATENTS = (3, 8, 12, 12)


@pytest.fixture(autouse=True)
def _recipe_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`recipe.yaml`, `prompts.txt`, and folders of shards: `captions`, `latents` and `pairs`."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Path("prompts.txt").write_text("a red ball moving left\n")
    video = torch.zeros(LATENTS, dtype=torch.bfloat16)
    for name, latents, noise in (("captions", None, None), ("latents", video, None), ("pairs", video, video.clone())):
        with ShardWriter(name, latent_shape=LATENTS, bucket=name) as writer:
            writer.add("0", torch.zeros(2, 32, dtype=torch.bfloat16), "a ball", latents=latents, noise=noise)
        write_negative_prompt(name, torch.zeros(1, 32, dtype=torch.bfloat16))
        consolidate(name)


def check(*words: str) -> list[str]:
    recipe = load_recipe("recipe.yaml", words)
    return preflight.check(recipe, recipe.layout(1))


def message(*words: str) -> str:
    with pytest.raises(UserError) as error:
        check(*words)
    return str(error.value)


# Videos that the model can make


@pytest.mark.parametrize("shards", ["prompts:prompts.txt", "latents"])
def test_a_size_of_video_that_the_model_cannot_make_is_refused(shards: str):
    assert check(f"data.shards={shards}", VIDEO)
    assert message(f"data.shards={shards}", VIDEO, "data.video.height=13") == (
        "data.video.height = 13: expected a multiple of 2 (VAE stride 1, patch size 2); nearest: 12 or 14"
    )


# Objectives that need latents


SETTINGS = [
    (["objective.name=flow_matching"], "objective.name = flow_matching"),
    (["objective.rollout=data"], "objective.rollout = data"),
    (["objective={name: dmd2, rollout: data}"], "objective.rollout = data"),
    (["objective={name: dmd2, gan: {weight: 0.1}}"], "objective.gan.weight > 0"),
]


@pytest.mark.parametrize("words, setting", SETTINGS)
@pytest.mark.parametrize(
    "shards, source", [("prompts:prompts.txt", None), ("captions", None), ("[latents, captions]", "captions")]
)
def test_an_objective_that_needs_latents_refuses_captions(
    words: list[str], setting: str, shards: str, source: str | None
):
    assert message(f"data.shards={shards}", VIDEO, *words) == (
        f"data.shards = '{source or shards}': {setting} needs latents, this holds captions only; name shards with"
        " latents or change that key"
    )


@pytest.mark.parametrize("words, setting", SETTINGS)
@pytest.mark.parametrize("shards", ["world:moving_shapes", "latents"])
def test_an_objective_that_needs_latents_takes_them(words: list[str], setting: str, shards: str):
    assert check(f"data.shards={shards}", *words)


# Objectives that need pairs


PAIRS = "objective={name: dmd}"


@pytest.mark.parametrize(
    "shards, source",
    [("prompts:prompts.txt", None), ("captions", None), ("latents", None), ("world:moving_shapes", None),
     ("[pairs, latents]", "latents")],
)  # fmt: skip
def test_an_objective_that_needs_pairs_says_how_to_make_them(shards: str, source: str | None):
    source = source or shards
    assert message(f"data.shards={shards}", VIDEO, PAIRS) == (
        f"data.shards = '{source}': objective.regression_weight > 0 needs pairs of noise and the teacher's sample, this"
        f" holds none; make them with python launch/prepare.py pairs RECIPE OUT data.shards={source} and name OUT"
        " there, or change that key"
    )


def test_an_objective_that_needs_pairs_takes_them():
    assert check("data.shards=pairs", PAIRS)
    assert check("data.shards=captions", "objective={name: dmd, regression_weight: 0}")
    assert check("data.shards=pairs", "objective={name: dmd2, rollout: data}")


@pytest.mark.parametrize("rollout", ["euler", "renoise"])
@pytest.mark.parametrize("shards", ["prompts:prompts.txt", "captions"])
def test_rollouts_from_noise_take_captions(rollout: str, shards: str):
    assert check(f"data.shards={shards}", VIDEO, f"objective.rollout={rollout}")


# What is watched


def test_motion_is_watched_of_few_step_generators_only():
    assert check("data.shards=captions", "health.motion={every: 10}")
    assert message("data.shards=latents", "objective={name: flow_matching}", "health.motion={}") == (
        "health.motion: objective.name = flow_matching trains no few-step generator to sample; remove health.motion"
    )


def test_only_ranks_that_there_are_can_be_profiled():
    assert check("data.shards=captions", "logging.profile={steps: [5, 6]}")
    assert message("data.shards=captions", "logging.profile={ranks: [0, 1]}") == (
        "logging.profile.ranks = [0, 1]: there are 1 ranks, numbered from 0; give ranks that there are"
    )


# The run's folder


def test_a_run_that_could_not_be_written_is_refused() -> None:
    said = message("data.shards=latents", "run.dir=prompts.txt/run")
    assert said.startswith("run.dir = 'prompts.txt/run': ") and said.endswith(
        "prompts.txt is no folder; choose another folder"
    )
