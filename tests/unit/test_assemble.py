"""From a recipe to networks: sharded ones for training, whole ones for sampling, and those of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sgmd_dist import checkpoint
from sgmd_dist.assemble import (
    build_model,
    build_networks,
    build_objective,
    load_network,
    load_weights,
    model_of_checkpoint,
)
from sgmd_dist.errors import UserError
from sgmd_dist.export import export_diffusers
from sgmd_dist.layout import Layout
from sgmd_dist.parallel.mesh import Mesh, build_mesh
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import dump_recipe
from sgmd_dist.roles import Roles, build_roles

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
ROLES = {"teacher": False, "generator": True, "fake_score": True}


@pytest.fixture(scope="module")
def mesh(alone: torch.device) -> Mesh:
    layout = Layout(world_size=1, dp_replicate=1, dp_shard=1, ring=1, ulysses=1, num_units=4, accumulation=4)
    return build_mesh(layout, alone)


def random_weights(recipe: Recipe, seed: int = 0) -> dict[str, Tensor]:
    """Full tensors for the recipe's network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        named = list(build_model(recipe, "generator").build().named_parameters())
    return {name: torch.randn(p.shape, generator=generator) for name, p in named}


@pytest.fixture
def pretrained(tiny_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A diffusers folder with `random_weights`."""
    recipe = tiny_recipe()
    export_diffusers(random_weights(recipe), build_model(recipe, "generator"), tmp_path / "pretrained")
    return tmp_path / "pretrained"


def full(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor() for name, p in module.named_parameters()}  # pyright: ignore


# Recipes


@pytest.mark.parametrize(
    "name, roles",
    [("sgmd", ROLES), ("dmd2", ROLES), ("sid", ROLES), ("sim", ROLES), ("flow_matching", {"generator": True})],
)
def test_an_objective_says_which_roles_there_are_and_which_are_trained(
    tiny_recipe: MakeRecipe, name: str, roles: dict[str, bool]
) -> None:
    assert build_objective(tiny_recipe(f"objective={{name: {name}}}")).roles == roles


def test_a_role_takes_its_own_folder_or_the_common_one(
    tiny_recipe: MakeRecipe, pretrained: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(f"model.teacher.pretrained={pretrained}")
    ((file,),) = build_model(recipe, "teacher").weight_files().values()
    assert file.parent == pretrained
    assert build_model(recipe, "generator").weight_files() == {}
    recipe = tiny_recipe(f"model.pretrained={pretrained}", f"model.teacher.pretrained={tmp_path / 'nowhere'}")
    assert build_model(recipe, "fake_score").weight_files() == {"": [file]}
    with pytest.raises(UserError, match=r"model\.teacher\.pretrained = '.*/nowhere': no such folder"):
        build_model(recipe, "teacher")


# Networks to train


def test_pretrained_weights_arrive_in_every_role(tiny_recipe: MakeRecipe, pretrained: Path, mesh: Mesh) -> None:
    recipe = tiny_recipe(f"model.pretrained={pretrained}")
    networks = build_networks(recipe, mesh, ROLES)
    expected = random_weights(recipe)
    assert networks.keys() == ROLES.keys()
    for module, _ in networks.values():
        found = full(module)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_frozen_teacher_is_kept_in_the_compute_dtype_and_the_trained_in_float32(
    tiny_recipe: MakeRecipe, mesh: Mesh
) -> None:
    networks = build_networks(tiny_recipe("model.compute_dtype=bfloat16"), mesh, ROLES)
    dtypes = {name: {p.dtype for p in module.parameters()} for name, (module, _) in networks.items()}
    assert dtypes == {"teacher": {torch.bfloat16}, "generator": {torch.float32}, "fake_score": {torch.float32}}


def test_random_weights_follow_from_the_seed_alone(tiny_recipe: MakeRecipe, mesh: Mesh) -> None:
    first, again, other = (
        full(build_networks(tiny_recipe(f"run.seed={seed}"), mesh, {"generator": True})["generator"][0])
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_folder_of_another_network_is_refused_before_anything_is_loaded(
    tiny_recipe: MakeRecipe, pretrained: Path, mesh: Mesh
) -> None:
    config = pretrained / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 1', '"num_layers": 2'))
    with pytest.raises(UserError, match=r"the weights do not fit the network: \d+ missing \(blocks\.1\."):
        build_networks(tiny_recipe(f"model.pretrained={pretrained}", "model.config=null"), mesh, {"generator": True})


# Networks to sample from


@pytest.fixture
def clip() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 3, 3, 4, 6, generator=generator), torch.randn(2, 8, 32, generator=generator)
    return latents, torch.tensor([0.3, 0.9]), text


def test_given_weights_and_a_folder_with_them_are_one_network(
    tiny_recipe: MakeRecipe, pretrained: Path, clip: tuple[Tensor, Tensor, Tensor]
) -> None:
    recipe = tiny_recipe()
    given = load_network(build_model(recipe, "generator"), random_weights(recipe), CPU)
    read = load_network(build_model(tiny_recipe(f"model.pretrained={pretrained}"), "generator"), None, CPU)
    velocity = given(*clip)
    assert velocity.shape == clip[0].shape and velocity.dtype == torch.float32
    assert velocity.isfinite().all() and not velocity.requires_grad
    assert torch.equal(velocity, read(*clip))


def test_an_unsharded_network_computes_what_the_sharded_one_does(
    tiny_recipe: MakeRecipe, pretrained: Path, mesh: Mesh, clip: tuple[Tensor, Tensor, Tensor]
) -> None:
    recipe = tiny_recipe(f"model.pretrained={pretrained}")
    module, model = build_networks(recipe, mesh, {"generator": True})["generator"]
    with torch.no_grad():
        sharded = model.velocity(module, *clip)
    assert torch.allclose(load_network(model, None, CPU)(*clip), sharded, atol=1e-5)


# Checkpoints


@pytest.fixture
def trained(tiny_recipe: MakeRecipe, mesh: Mesh, optimizer_step: Callable[..., None]) -> tuple[Path, Roles]:
    """A checkpoint after one step of the generator, and the roles that it was saved from."""
    recipe = tiny_recipe()
    networks = build_networks(recipe, mesh, {"generator": True})
    roles = build_roles(networks, {"generator"}, recipe.optim, 10, recomputes=False)
    optimizer_step(roles)
    path = checkpoint.save(Path(recipe.run.dir), roles, step=1, stream={}, recipe=dump_recipe(recipe), keep=1)
    return path, roles


def test_a_checkpoint_gives_back_recipe_model_and_the_generators_weights(
    tiny_recipe: MakeRecipe, trained: tuple[Path, Roles]
) -> None:
    path, roles = trained
    recipe, model = model_of_checkpoint(path)
    assert recipe == tiny_recipe()
    weights = load_weights(path, "generator", model)
    expected = full(roles["generator"].module)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    average = load_weights(path, "generator.ema", model)
    assert any(not torch.equal(average[name], weights[name]) for name in weights)


def test_a_network_that_was_not_trained_is_not_in_the_checkpoint(trained: tuple[Path, Roles]) -> None:
    path, _ = trained
    _, model = model_of_checkpoint(path)
    with pytest.raises(
        UserError, match=r"holds no 'fake_score'; it has generator, generator\.optimizer, generator\.ema"
    ):
        load_weights(path, "fake_score", model)


def test_a_network_of_another_size_is_refused_and_the_checkpoint_not_blamed(
    tiny_recipe: MakeRecipe, trained: tuple[Path, Roles]
) -> None:
    path, _ = trained
    for change, expected in (
        ("ffn_dim=40", r"expected \(40, 24\)"),
        ("num_layers=2", r"has \d+ tensors, expected \d+"),
    ):
        model = build_model(tiny_recipe(f"model.config.{change}"), "generator")
        with pytest.raises(UserError, match=rf"is of another network: .*{expected}") as error:
            load_weights(path, "generator", model)
        assert "remove" not in str(error.value)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (Path.unlink, r"recipe\.yaml: no such recipe"),
        (lambda path: path.write_text(""), r"recipe\.yaml: the file is empty"),
        (lambda path: path.write_text("run: ["), r"recipe\.yaml: line 1, column \d+: not valid YAML"),
        (lambda path: path.write_bytes(b"\xff"), r"recipe\.yaml: cannot be read as a recipe"),
    ],
)
def test_a_checkpoint_whose_recipe_is_damaged_is_named(
    trained: tuple[Path, Roles], damage: Callable[[Path], object], expected: str
) -> None:
    path, _ = trained
    damage(path / checkpoint.RECIPE_FILE)
    with pytest.raises(UserError, match=expected):
        model_of_checkpoint(path)


def test_a_pretrained_folder_that_has_moved_since_is_named(
    tiny_recipe: MakeRecipe, pretrained: Path, trained: tuple[Path, Roles]
) -> None:
    path, _ = trained
    (path / checkpoint.RECIPE_FILE).write_text(dump_recipe(tiny_recipe(f"model.pretrained={pretrained}")))
    pretrained.rename(pretrained.with_name("moved"))
    with pytest.raises(UserError, match=r"model\.pretrained = '.*/pretrained': no such folder"):
        model_of_checkpoint(path)
