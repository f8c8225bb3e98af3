"""The plan that `--check` prints, and what it refuses beside data: folders, checkpoints, networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sgmd_dist import checkpoint, preflight
from sgmd_dist.assemble import build_model
from sgmd_dist.errors import UserError
from sgmd_dist.planner.machine import GIB
from sgmd_dist.recipe import Recipe
from sgmd_dist.roles import Roles

MakeRecipe = Callable[..., Recipe]


def plan(recipe: Recipe, world_size: int = 1) -> dict[str, str]:
    """First word of each line -> the rest."""
    lines = preflight.check(recipe, recipe.layout(world_size))
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def num_parameters(recipe: Recipe) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(recipe, "generator").build().parameters())


def test_the_plan_says_what_runs_where_and_with_which_batch(tiny_recipe: MakeRecipe) -> None:
    found = plan(tiny_recipe("parallel.dp_replicate=2"), world_size=4)
    assert found["recipe"] == "tiny: sgmd on wan, 10 steps"
    assert found["ranks"] == "4 = dp_replicate 2 x dp_shard 2 x ring 1 x ulysses 1"
    assert found["batch"] == "global 8 = micro 2 x data parallel 4 x accumulation 1"
    assert found["updates"] == "generator, fake_score per step"


def test_the_plan_explains_how_a_video_lies_on_the_ranks(tiny_recipe: MakeRecipe) -> None:
    """The world's latents make 288 tokens."""
    assert "exchange" not in plan(tiny_recipe())
    whole = plan(tiny_recipe())["tokens"]
    assert whole.endswith("288 per rank on 1, padding 0.00%; 2 heads: 2 per rank on 1, padding 0.00%")
    for dtype, item_bytes in (("float32", 4), ("bfloat16", 2)):
        seven = ("data.global_batch_size=14", f"model.compute_dtype={dtype}", "parallel.ulysses=7")
        found = plan(tiny_recipe(*seven), world_size=7)
        assert found["tokens"].endswith(": 42 per rank on 7, padding 2.04%; 2 heads: 1 per rank on 7, padding 71.43%")
        numbers = 2 * 42 * 7 * 12  # batch, run, padded heads, head size
        each_way = 4 * numbers * 6 / 7 * item_bytes / preflight.MIB
        line = f"{each_way:.3f} MiB (2 all-to-alls)"
        assert found["exchange"].startswith(
            f"sent by a rank in each of 1 blocks for a micro-batch: forward {line}, backward {line};"
        )
    hybrid = plan(tiny_recipe("parallel.ulysses=2", "parallel.ring=3"), world_size=6)
    assert "(2 all-to-alls, 2 hops)" in hybrid["exchange"] and "(2 all-to-alls, 5 hops)" in hybrid["exchange"]


def test_every_update_of_the_fake_score_is_in_the_plan(tiny_recipe: MakeRecipe) -> None:
    found = plan(tiny_recipe("objective.name=dmd2", "objective.fake_updates=3"))
    assert found["updates"].split(", ").count("fake_score") + found["updates"].count("fake_score per step") == 3


def test_memory_counts_weights_gradients_moments_and_the_average(tiny_recipe: MakeRecipe) -> None:
    """4 bytes of float32 weights or 2 of bfloat16; 12 more to train; 4 more for the generator's average."""
    recipe = tiny_recipe("model.config.ffn_dim=200000", "model.teacher.dtype=bfloat16")
    gib = num_parameters(recipe) / GIB
    found = plan(recipe, world_size=4)
    billions = f"{num_parameters(recipe) / 1e9:.4f} B parameters"
    assert found["teacher"] == f"{billions}, frozen, {2 * gib / 4:.3f} GiB per rank"
    assert found["generator"] == f"{billions}, trained, {20 * gib / 4:.3f} GiB per rank"
    assert found["fake_score"] == f"{billions}, trained, {16 * gib / 4:.3f} GiB per rank"


def test_replicas_hold_what_one_shard_group_holds(tiny_recipe: MakeRecipe) -> None:
    wide = "model.config.ffn_dim=200000"
    sharded, replicated = plan(tiny_recipe(wide), 2), plan(tiny_recipe(wide, "parallel.dp_replicate=2"), 4)
    assert sharded["generator"] == replicated["generator"] != plan(tiny_recipe(wide), 4)["generator"]


def test_the_check_writes_nothing(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe()
    plan(recipe)
    assert not Path(recipe.run.dir).exists()


def test_adapters_are_planned_apart_from_their_base(tiny_recipe: MakeRecipe) -> None:
    """A of rank x in and B of out x rank, on to_q of two attentions: 16 bytes each to train, 4 more for the average."""
    section = "{rank: 1000000, targets: [to_q]}"
    lora = [f"model.generator.lora={section}", f"model.fake_score.lora={section}"]
    found, whole = plan(tiny_recipe(*lora)), plan(tiny_recipe())
    size = 2 * (24 + 24) * 1e6
    shown = f"{size / 1e9:.4f} B parameters of an adapter of rank 1000000, trained"
    assert found["generator"] == f"{shown}, {20 * size / preflight.GIB:.3f} GiB per rank"
    assert found["fake_score"] == f"{shown}, {16 * size / preflight.GIB:.3f} GiB per rank"
    assert found["teacher"] == whole["teacher"] and "base" not in found
    alone = plan(tiny_recipe("objective={name: flow_matching}", lora[0]))
    assert alone["base"] == whole["teacher"] and alone["generator"] == found["generator"]


def test_a_wrong_adapter_is_refused_before_anything_is_busy(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(
        UserError, match=r"model\.generator\.lora\.targets: 'q' is no layer of a block; allowed: to_q, "
    ):
        plan(tiny_recipe("model.generator.lora.targets=[q]"))


@pytest.mark.parametrize("role", ["teacher", "generator", "fake_score"])
def test_a_missing_folder_is_named_by_the_key_that_gave_it(tiny_recipe: MakeRecipe, role: str) -> None:
    with pytest.raises(UserError, match=rf"model\.{role}\.pretrained = 'nowhere': no such folder"):
        plan(tiny_recipe(f"model.{role}.pretrained=nowhere"))
    with pytest.raises(UserError, match=r"model\.pretrained = 'nowhere': no such folder"):
        plan(tiny_recipe("model.pretrained=nowhere"))


# run.resume


def test_a_checkpoint_to_resume_from_must_be_there(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: expected a checkpoint or a run folder with a committed one"):
        plan(tiny_recipe(f"run.resume={tmp_path / 'nowhere'}"))


def test_a_checkpoint_to_resume_from_must_be_readable(
    tiny_recipe: MakeRecipe, tmp_path: Path, alone: torch.device, linear_roles: Callable[..., Roles]
) -> None:
    path = checkpoint.save(tmp_path / "old", linear_roles(), step=3, stream={}, recipe="", keep=1)
    for place in (path, tmp_path / "old"):
        assert plan(tiny_recipe(f"run.resume={place}"))
    (path / "meta.json").write_text("")
    with pytest.raises(UserError, match=r"meta\.json: is not a checkpoint's description"):
        plan(tiny_recipe(f"run.resume={path}"))


@pytest.mark.parametrize("choice", ["auto", "never"])
def test_without_a_path_nothing_has_to_be_there(tiny_recipe: MakeRecipe, choice: str) -> None:
    assert plan(tiny_recipe(f"run.resume={choice}"))
