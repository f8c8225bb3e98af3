"""The shipped recipes: their resolved form, the released values, and that each can be checked without GPUs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES

from sgmd_dist import preflight
from sgmd_dist.assemble import build_architecture, build_objective
from sgmd_dist.data.format import write_negative_prompt
from sgmd_dist.data.index import consolidate
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.flow import reaches
from sgmd_dist.objectives._distillation import Distillation
from sgmd_dist.objectives.base import StepState
from sgmd_dist.recipe_file import dump_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GOLDEN_DIR = ROOT / "tests" / "golden"
REGENERATE = "python tests/golden/regenerate.py"

RELEASED = {
    "sgmd_wan2.1_1.3b": {"steps": 1000, "per_rank": 2, "accumulation": 1, "diversity": 0.05, "video": (81, 480, 832)},
    "sgmd": {"steps": 5000, "per_rank": 1, "accumulation": 4, "diversity": 0.0, "video": (81, 480, 832)},
    "sgmd_wan2.2_5b": {"steps": 5000, "per_rank": 1, "accumulation": 4, "diversity": 0.0, "video": (121, 704, 1280)},
}
WORLD_SIZES = {"sgmd_wan2.1_1.3b": 8, "sgmd": 64, "sgmd_wan2.2_5b": 64}
LATENTS = {"sgmd_wan2.1_1.3b": (16, 21, 60, 104), "sgmd": (16, 21, 60, 104), "sgmd_wan2.2_5b": (48, 31, 44, 80)}


def by_name(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


@pytest.fixture(autouse=True)
def _in_the_repo_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # shipped recipes name files relative to it


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_resolves_to_its_golden_file(recipe: Path):
    golden = GOLDEN_DIR / recipe.name
    assert golden.is_file(), f"run: {REGENERATE}"
    assert dump_recipe(load_recipe(recipe)) == golden.read_text(encoding="utf-8"), f"if it is wanted, run: {REGENERATE}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_golden_file_is_a_recipe_itself(recipe: Path):
    assert load_recipe(GOLDEN_DIR / recipe.name) == load_recipe(recipe)


def test_every_golden_file_belongs_to_a_shipped_recipe():
    assert [path.name for path in sorted(GOLDEN_DIR.glob("*.yaml"))] == [path.name for path in RECIPES]


# The released values (the authors' three recipes)


@pytest.mark.parametrize("name", RELEASED)
def test_released_recipes_share_the_loss_schedule_and_the_optimizers(name: str):
    recipe = load_recipe(by_name(name)).resolved()
    adamw = {"betas": [0.0, 0.999], "weight_decay": 0.01, "eps": 1e-8}
    assert recipe["optim"]["generator"] == {"lr": 2e-6, **adamw}
    assert recipe["optim"]["fake_score"] == {"lr": 4e-7, **adamw}
    assert recipe["optim"]["max_grad_norm"] == 10.0
    assert recipe["optim"]["schedule"] == {"name": "constant", "warmup_steps": 0, "final_ratio": 0.0}
    expected: dict[str, Any] = {
        "name": "sgmd",
        "guidance_scale": 3.0,
        "nr_weight": 0.1,
        "rc_weight": 1.0,
        "fisher_weight": 1.0,
        "student_steps": 4,
        "sigma_shift": 5.0,
        "sigma_min": 0.02,
        "sigma_max": 0.98,
        "fake_updates": 1.0,
        "inner_sample": "fresh",
        "rollout": "euler",
    }
    assert {key: recipe["objective"][key] for key in expected} == expected
    assert recipe["model"]["compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", RELEASED)
def test_released_recipes_hold_their_own_values(name: str):
    recipe, values = load_recipe(by_name(name)), RELEASED[name]
    layout = recipe.layout(WORLD_SIZES[name])
    assert recipe.run.steps == values["steps"]
    assert (recipe.data.micro_batch_size, layout.accumulation) == (values["per_rank"], values["accumulation"])
    assert recipe.resolved()["objective"]["diversity"]["weight"] == values["diversity"]
    video = recipe.data.video
    assert video is not None
    assert (video.num_frames, video.height, video.width) == values["video"]
    assert build_architecture(recipe, "generator").latent_shape(*values["video"]) == LATENTS[name]


@pytest.mark.parametrize(
    "name, millions",
    [("sgmd_wan2.1_1.3b", 1419.0), ("sgmd", 14288.5), ("sgmd_wan2.2_5b", 4999.8), ("sgmd_wan2.2_a14b", 2 * 14288.5)],
)
def test_the_models_of_the_released_recipes_have_their_published_number_of_parameters(name: str, millions: float):
    """Counted from the published files; planned without them."""
    with torch.device("meta"):
        module = build_architecture(load_recipe(by_name(name)), "teacher").build()
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name, millions", [("sgmd_wan2.1_i2v_14b", 16394.9), ("sgmd_wan2.2_i2v_a14b", 2 * 14288.9)])
def test_image_to_video_adds_channels_and_embeddings(name: str, millions: float):
    """20 more channels before the first layer; for Wan2.1 a projector of embeddings, keys and values of the image."""
    with torch.device("meta"):
        module = build_architecture(load_recipe(by_name(name)), "teacher").build()
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert build_architecture(load_recipe(by_name(name)), "generator").latent_shape(81, 480, 832) == LATENTS["sgmd"]


def test_the_diversity_term_of_the_small_recipe_walks_5_of_30_teacher_steps():
    diversity = load_recipe(by_name("sgmd_wan2.1_1.3b")).resolved()["objective"]["diversity"]
    assert diversity == {"weight": 0.05, "steps": 5, "total_steps": 30}


def test_the_5b_model_takes_a_timestep_per_token():
    assert load_recipe(by_name("sgmd_wan2.2_5b")).resolved()["model"]["expand_timesteps"] is True


def test_the_a14b_recipe_trains_both_experts_in_every_step():
    """On 64 ranks each of the four groups of units has its own exit: 1.0 and 0.9375 above the boundary, two below."""
    recipe = load_recipe(by_name("sgmd_wan2.2_a14b"))
    objective, boundary = build_objective(recipe), build_architecture(recipe, "generator").boundaries[0]
    assert isinstance(objective, Distillation) and recipe.layout(64).accumulation == 4
    for step in range(5):
        states = [StepState(step, 0, 256, unit_index=unit) for unit in (0, 64, 128, 192)]
        sigmas = [objective.sigmas[objective.exit_index(state, "rollout")] for state in states]
        assert sorted(reaches(sigma, boundary) for sigma in sigmas) == [False, False, True, True]


def test_dmd2_differs_from_the_sgmd_recipe_in_its_objective_alone():
    dmd2, sgmd = (load_recipe(by_name(f"{name}_wan2.1_1.3b")).resolved() for name in ("dmd2", "sgmd"))
    assert {key for key in sgmd if dmd2[key] != sgmd[key]} == {"run", "objective"}
    shared = {key for key in dmd2["objective"] if dmd2["objective"][key] == sgmd["objective"].get(key)}
    assert set(dmd2["objective"]) - shared == {"name", "fake_updates", "gan"}
    assert dmd2["objective"]["fake_updates"] == 5.0 and dmd2["objective"]["gan"]["weight"] == 0.0


def test_the_prompts_are_64_different_lines():
    lines = (ROOT / "recipes" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 64
    assert all(line == line.strip() and len(line.split()) >= 10 for line in lines)


# --check


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `--check` wants it: a tiny Wan transformer, a second one for a recipe with a boundary between two,
    and the text encoder of the tiny recipes."""
    return _tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline", in_channels=3)


@pytest.fixture(scope="module")
def tiny_image_words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same for image to video, and shards with images, as words of a command line."""
    folder = tmp_path_factory.mktemp("tiny_image")
    pipeline = _tiny_pipeline(folder / "pipeline", in_channels=10, image_dim=10, added_kv_proj_dim=24)
    with ShardWriter(folder / "shards", latent_shape=(3, 2, 4, 4), bucket="images") as writer:
        image = {"condition_latents": torch.zeros(3, 2, 4, 4), "image_embeds": torch.zeros(5, 10)}
        writer.add("one", torch.zeros(2, 32), "a caption", **image)
    write_negative_prompt(folder / "shards", torch.zeros(1, 32))
    consolidate(folder / "shards")
    return [f"model.pretrained={pipeline}", "model.config=null", f"data.shards={folder / 'shards'}"]


def _tiny_pipeline(folder: Path, **inputs: int) -> Path:
    from diffusers import WanTransformer3DModel

    tiny = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "freq_dim": 16}
    module = WanTransformer3DModel(out_channels=3, text_dim=32, rope_max_seq_len=32, **tiny, **inputs)
    for part in ("transformer", "transformer_2"):
        module.save_pretrained(folder / part)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(ROOT / "recipes" / "tiny_wan" / part, folder / part)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_shipped_recipe_passes_the_check_with_a_local_model_folder(
    recipe: Path, world_size: int, tiny_pipeline: Path, tiny_image_words: list[str], tmp_path: Path
):
    folder, family = tiny_pipeline, load_recipe(recipe).model.family
    changed = ["data.shards=world:moving_shapes"] if recipe.stem == "tiny_videos" else []
    if family in FAMILIES:
        changed = ["model.text_tokens=5"]
        folder = FAMILIES[family].save(tmp_path / "pipeline")
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(tiny_pipeline / part, folder / part)
    of_text = [f"model.pretrained={folder}", "model.config=null", *changed]
    loaded = load_recipe(recipe, tiny_image_words if "_i2v_" in recipe.stem else of_text)
    plan = preflight.check(loaded, loaded.layout(world_size))
    assert f"{loaded.run.steps} steps" in plan[0]
