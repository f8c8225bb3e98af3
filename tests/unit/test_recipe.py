"""Recipes: reading, inheritance, overrides, schedules, the layout on ranks, and the way back to YAML."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from sgmd_dist.errors import UserError
from sgmd_dist.layout import Layout
from sgmd_dist.objectives.dmd2 import Section as Dmd2Section
from sgmd_dist.objectives.sgmd import Section as SgmdSection
from sgmd_dist.recipe import Recipe, shard_list
from sgmd_dist.recipe_file import dump_recipe, load_recipe

MINIMAL = """
    model: {family: wan, config: {num_layers: 2}}
    objective: {name: sgmd}
    data: {shards: some/folder}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, "minimal.yaml", MINIMAL)


# Reading


def test_a_recipe_of_three_lines_has_every_default(minimal: Path):
    recipe = load_recipe(minimal)
    assert recipe.run.steps == 1000
    assert recipe.data.global_batch_size == 64
    assert recipe.optim.generator.betas == (0.0, 0.999)
    assert isinstance(recipe.objective, SgmdSection)
    assert recipe.objective.nr_weight.at(0) == 0.1


@pytest.mark.parametrize("written", ["1e-5", "'1e-5'", "1.0e-5", "0.00001", "'0.00001'"])
def test_a_number_may_be_written_in_any_way(minimal: Path, written: str):
    assert load_recipe(minimal, [f"optim.generator.lr={written}"]).optim.generator.lr.at(0) == 1e-5
    assert load_recipe(minimal, [f"optim.generator.weight_decay={written}"]).optim.generator.weight_decay == 1e-5


def test_an_integer_may_be_written_with_an_exponent(minimal: Path):
    assert load_recipe(minimal, ["run.steps=1e3"]).run.steps == 1000


def test_a_date_is_text(minimal: Path):
    assert load_recipe(minimal, ["run.dir=2026-07-01"]).run.dir == "2026-07-01"


def test_a_recipe_is_frozen(minimal: Path):
    recipe = load_recipe(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.run.steps = 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.objective.nr_weight.to = 5.0  # pyright: ignore[reportAttributeAccessIssue]


def test_shards_are_a_list_whether_one_or_many():
    assert shard_list("a") == ["a"]
    assert shard_list(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    "role, expected", [("teacher", "bfloat16"), ("generator", "float32"), ("fake_score", "float32")]
)
def test_trained_roles_keep_float32_and_the_teacher_the_compute_dtype(minimal: Path, role: str, expected: str):
    assert load_recipe(minimal).model.for_role(role).dtype == expected


def test_a_role_takes_its_own_weights_before_the_shared_ones(minimal: Path):
    model = load_recipe(minimal, ["model.pretrained=shared", "model.teacher.pretrained=own"]).model
    assert model.for_role("teacher").pretrained == "own"
    assert model.for_role("generator").pretrained == "shared"


# Inheritance


def test_a_recipe_overrides_its_base_key_by_key(tmp_path: Path, minimal: Path):
    write(tmp_path, "child.yaml", "base: minimal.yaml\nobjective: {nr_weight: 0.2}\nrun: {steps: 7}\n")
    grandchild = write(tmp_path, "sub/grandchild.yaml", "base: ../child.yaml\nrun: {name: mine}\n")
    recipe = load_recipe(grandchild)
    assert (recipe.run.name, recipe.run.steps) == ("mine", 7)
    assert isinstance(recipe.objective, SgmdSection)
    assert recipe.objective.nr_weight.at(0) == 0.2
    assert recipe.data.shards == "some/folder"


def test_a_list_replaces_the_list_of_the_base(tmp_path: Path, minimal: Path):
    child = write(tmp_path, "child.yaml", "base: minimal.yaml\noptim: {generator: {betas: [0.5, 0.9]}}\n")
    assert load_recipe(child).optim.generator.betas == (0.5, 0.9)


def test_another_objective_replaces_the_section_of_the_base(tmp_path: Path):
    write(tmp_path, "base.yaml", MINIMAL.replace("sgmd}", "sgmd, nr_weight: 0.3, guidance_scale: 7}"))
    child = write(tmp_path, "child.yaml", "base: base.yaml\nobjective: {name: dmd2, sigma_min: 0.1}\n")
    objective = load_recipe(child).objective
    assert isinstance(objective, Dmd2Section)
    assert (objective.sigma_min.at(0), objective.guidance_scale.at(0)) == (0.1, 3.0)


def test_the_same_objective_named_again_replaces_nothing(tmp_path: Path):
    write(tmp_path, "base.yaml", MINIMAL.replace("sgmd}", "sgmd, nr_weight: 0.3}"))
    child = write(tmp_path, "child.yaml", "base: base.yaml\nobjective: {name: sgmd, sigma_min: 0.1}\n")
    objective = load_recipe(child).objective
    assert isinstance(objective, SgmdSection)
    assert objective.nr_weight.at(0) == 0.3


def test_a_schedule_replaces_a_schedule_and_a_number(tmp_path: Path):
    ramp = "{schedule: linear, from: 0.0, to: 0.1, steps: 10, start: 5}"
    write(tmp_path, "base.yaml", MINIMAL.replace("sgmd}", f"sgmd, nr_weight: {ramp}}}"))
    points = "{schedule: piecewise, points: [[0, 1.0], [5, 2.0]]}"
    text = f"base: base.yaml\nobjective: {{nr_weight: {points}, rc_weight: {points}}}\n"
    objective = load_recipe(write(tmp_path, "child.yaml", text)).objective
    assert isinstance(objective, SgmdSection)
    assert [objective.nr_weight.at(step) for step in (0, 4, 5, 99)] == [1.0, 1.0, 2.0, 2.0]
    assert objective.rc_weight == objective.nr_weight


# Overrides


def test_the_last_override_wins_over_the_file(minimal: Path):
    recipe = load_recipe(minimal, ["run.steps=5", "run.name=a=b", "run.steps=6", "data.shards=[x, y]"])
    assert (recipe.run.steps, recipe.run.name, recipe.data.shards) == (6, "a=b", ["x", "y"])


def test_overrides_of_a_section_hold_whether_before_or_after_the_plugin_is_named(minimal: Path):
    words = ["objective.fake_updates=3", "objective.name=dmd2"]
    recipes = [load_recipe(minimal, order) for order in (words, words[::-1])]
    assert recipes[0] == recipes[1]
    assert isinstance(recipes[0].objective, Dmd2Section)
    assert recipes[0].objective.num_fake_updates(0) == 3


def test_an_override_reaches_into_a_schedule(minimal: Path):
    ramp = "objective.nr_weight={schedule: linear, from: 0, to: 0.1, steps: 10}"
    objective = load_recipe(minimal, [ramp, "objective.nr_weight.to=0.2"]).objective
    assert isinstance(objective, SgmdSection)
    assert [objective.nr_weight.at(step) for step in (0, 5, 10)] == [0.0, 0.1, 0.2]


# Schedules


@pytest.mark.parametrize(
    "written, expected",
    [
        ("0.5", {0: 0.5, 1000: 0.5}),
        ("{schedule: linear, from: 0, to: 1, steps: 10}", {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        ("{schedule: linear, from: 0, to: 1, steps: 10, start: 5}", {0: 0.0, 5: 0.0, 10: 0.5, 15: 1.0}),
        ("{schedule: cosine, from: 1, to: 0, steps: 4}", {0: 1.0, 1: 0.8535534, 2: 0.5, 4: 0.0}),
        ("{schedule: piecewise, points: [[0, 0.1], [10, 0.3]]}", {0: 0.1, 9: 0.1, 10: 0.3, 11: 0.3}),
    ],
)
def test_a_loss_weight_follows_its_schedule(minimal: Path, written: str, expected: dict[int, float]):
    objective = load_recipe(minimal, [f"objective.nr_weight={written}"]).objective
    assert isinstance(objective, SgmdSection)
    assert {step: objective.nr_weight.at(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "key",
    [f"objective.{name}" for name in ("nr_weight", "rc_weight", "fisher_weight", "fake_updates", "guidance_scale")]
    + ["objective.sigma_min", "objective.sigma_max", "objective.diversity.weight", "optim.max_grad_norm"],
)
def test_every_number_of_the_loss_schedule_takes_a_schedule(minimal: Path, key: str):
    start, end = (1.0, 5.0) if key == "objective.fake_updates" else (0.9, 0.95) if "sigma_max" in key else (0.01, 0.05)
    ramp = {"schedule": "linear", "from": start, "to": end, "steps": 10}
    recipe = load_recipe(minimal, [f"{key}={ramp}"])
    value = recipe.resolved()
    for part in key.split("."):
        value = value[part]
    assert value == ramp


# Layout


def layout(minimal: Path, world_size: int, **values: object) -> Layout:
    places = {"batch": "data.global_batch_size", "micro": "data.micro_batch_size", "groups": "objective.exit_groups"}
    words = [f"{places.get(key, f'parallel.{key}')}={value}" for key, value in values.items()]
    return load_recipe(minimal, words).layout(world_size)


@pytest.mark.parametrize("world_size, accumulation", [(1, 256), (8, 32), (64, 4), (256, 1)])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(minimal: Path, world_size: int, accumulation: int):
    plan = layout(minimal, world_size, batch=256, micro=1)
    assert (plan.accumulation, plan.num_units, plan.dp_size) == (accumulation, 256, world_size)


def test_dp_shard_takes_the_ranks_that_replication_leaves(minimal: Path):
    plan = layout(minimal, 8, dp_replicate=2, batch=64, micro=2)
    assert (plan.dp_replicate, plan.dp_shard, plan.dp_size, plan.sequence_size) == (2, 4, 8, 1)
    assert (plan.num_units, plan.accumulation) == (32, 4)
    assert layout(minimal, 8, dp_replicate=2, dp_shard=4, batch=64, micro=2) == plan


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_exit_groups_divide_the_accumulation_steps(minimal: Path, groups: int):
    assert layout(minimal, 4, batch=32, micro=2, groups=groups).accumulation == 4


# The messages that name numbers: each pair of numbers in them appears in the recipe or the launch.

LAYOUT_ERRORS = [
    (
        3,
        {"dp_replicate": 2},
        "parallel.dp_replicate = 2: 3 ranks are not a multiple of dp_replicate 2 x ring 1 x ulysses 1 = 2;"
        " start a multiple of 2 ranks or change these axes",
    ),
    (
        4,
        {"dp_shard": 3},
        "parallel.dp_shard = 3: dp_replicate 1 x ring 1 x ulysses 1 x dp_shard 3 makes 3 ranks, not 4;"
        " set it to -1 (the rest) or start 3 ranks",
    ),
    (
        4,
        {"dp_shard": 4, "dp_replicate": 2},
        "parallel.dp_shard = 4: dp_replicate 2 x ring 1 x ulysses 1 x dp_shard 4 makes 8 ranks, not 4;"
        " set it to -1 (the rest) or start 8 ranks",
    ),
    (
        8,
        {"reshard_after_forward": 3},
        "parallel.reshard_after_forward = 3: parameters lie over dp_shard x ring x ulysses = 8 ranks; expected a"
        " smaller divisor of that, as the number of GPUs of a node, true or false",
    ),
    (
        8,
        {"reshard_after_forward": 4, "dp_replicate": 2},
        "parallel.reshard_after_forward = 4: parameters lie over dp_shard x ring x ulysses = 4 ranks; expected a"
        " smaller divisor of that, as the number of GPUs of a node, true or false",
    ),
    (
        3,
        {"batch": 64, "micro": 2},
        "data.global_batch_size = 64 is not a multiple of data.micro_batch_size 2 x data-parallel size 3 = 6;"
        " set it to 60 or 66",
    ),
    (
        64,
        {"batch": 16, "micro": 2},
        "data.global_batch_size = 16 is not a multiple of data.micro_batch_size 2 x data-parallel size 64 = 128;"
        " set it to 128",
    ),
    (
        4,
        {"batch": 32, "micro": 2, "groups": 3},
        "objective.exit_groups = 3: the 16 micro-batches of a step must split into 3 equal groups, each a multiple"
        " of the data-parallel size 4; choose a divisor of 4",
    ),
    (
        4,
        {"batch": 32, "micro": 2, "groups": 8},
        "objective.exit_groups = 8: the 16 micro-batches of a step must split into 8 equal groups, each a multiple"
        " of the data-parallel size 4; choose a divisor of 4",
    ),
]


@pytest.mark.parametrize("world_size, values, message", LAYOUT_ERRORS)
def test_a_layout_that_does_not_divide_says_so(minimal: Path, world_size: int, values: dict[str, int], message: str):
    with pytest.raises(UserError) as error:
        layout(minimal, world_size, **values)
    assert str(error.value) == message


# Back to YAML


def test_a_resolved_recipe_loads_to_an_equal_recipe(tmp_path: Path, minimal: Path):
    words = ["objective.nr_weight={schedule: cosine, from: 0, to: 0.1, steps: 500, start: 3}", "run.name='1e5'"]
    words += ["objective.rc_weight={schedule: piecewise, points: [[0, 1], [5, 2]]}", "data.shards=[a, '2026-07-01']"]
    recipe = load_recipe(minimal, [*words, "optim.generator.lr=1e-7", "run.dir='null'", "run.resume='über'"])
    again = load_recipe(write(tmp_path, "resolved.yaml", dump_recipe(recipe)))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def test_a_resolved_recipe_holds_every_key(minimal: Path):
    recipe = load_recipe(minimal)
    resolved = recipe.resolved()
    assert list(resolved) == list(Recipe.model_fields)
    assert set(resolved["objective"]) == set(SgmdSection.model_fields)
    assert resolved["model"]["config"]["num_layers"] == 2
