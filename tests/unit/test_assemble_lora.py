"""Networks with adapters: who shares a base, what a checkpoint gives back, and what is exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from sgmd_dist import adapters, checkpoint
from sgmd_dist.adapters import Lora
from sgmd_dist.assemble import build_model, build_networks, load_network, load_weights, lora_of, merge_adapter
from sgmd_dist.errors import UserError
from sgmd_dist.export import export_adapter, export_diffusers
from sgmd_dist.layout import Layout
from sgmd_dist.parallel.mesh import Mesh, build_mesh
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import dump_recipe
from sgmd_dist.roles import Roles, build_roles
from sgmd_dist.sampling import open_source

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
ROLES = {"teacher": False, "generator": True, "fake_score": True}
BOTH = ("model.generator.lora={rank: 4, alpha: 8}", "model.fake_score.lora={rank: 3}")


@pytest.fixture(scope="module")
def mesh(alone: torch.device) -> Mesh:
    layout = Layout(world_size=1, dp_replicate=1, dp_shard=1, ring=1, ulysses=1, num_units=4, accumulation=4)
    return build_mesh(layout, alone)


@pytest.fixture
def pretrained(tiny_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A transformer's folder with random weights, biases and output projection too."""
    model = build_model(tiny_recipe(), "generator")
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        named = list(model.build().named_parameters())
    weights = {name: torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5 for name, p in named}
    export_diffusers(weights, model, tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.fixture
def clip() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 3, 3, 4, 6, generator=generator), torch.randn(2, 8, 32, generator=generator)
    return latents, torch.tensor([0.3, 0.9]), text


def roles_of(recipe: Recipe, mesh: Mesh, names: dict[str, bool] = ROLES) -> Roles:
    trained = {name for name, is_trained in names.items() if is_trained}
    return build_roles(build_networks(recipe, mesh, names), trained, recipe.optim, 10, recomputes=False)


def sharing(roles: Roles) -> set[frozenset[str]]:
    """The roles, parted by their modules."""
    return {frozenset(other.name for other in roles.values() if other.module is role.module) for role in roles.values()}


# Who shares a base


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ((), [["teacher"], ["generator"], ["fake_score"]]),
        (BOTH, [["teacher", "generator", "fake_score"]]),
        (BOTH[:1], [["teacher", "generator"], ["fake_score"]]),
        (BOTH[1:], [["teacher", "fake_score"], ["generator"]]),
    ],
)
def test_roles_with_adapters_share_the_teachers_network(
    tiny_recipe: MakeRecipe, mesh: Mesh, overrides: tuple[str, ...], expected: list[list[str]]
) -> None:
    assert sharing(roles_of(tiny_recipe(*overrides), mesh)) == {frozenset(names) for names in expected}


def test_other_weights_are_another_base(tiny_recipe: MakeRecipe, mesh: Mesh, pretrained: Path, tmp_path: Path) -> None:
    other = shutil.copytree(pretrained, tmp_path / "other")
    recipe = tiny_recipe(*BOTH, f"model.pretrained={pretrained}", f"model.generator.pretrained={other}")
    roles = roles_of(recipe, mesh)
    assert sharing(roles) == {frozenset({"teacher", "fake_score"}), frozenset({"generator"})}
    assert {name: role.adapter for name, role in roles.items()} == {
        "teacher": None, "generator": "generator", "fake_score": "fake_score"
    }  # fmt: skip


def test_without_a_teacher_an_adapter_has_a_base_of_its_own(tiny_recipe: MakeRecipe, mesh: Mesh) -> None:
    roles = roles_of(tiny_recipe("objective={name: flow_matching}", BOTH[0]), mesh, {"generator": True})
    assert all(".lora_" in name for name in roles["generator"].parameters)


def test_the_base_has_the_teachers_dtype_and_adapters_are_float32(tiny_recipe: MakeRecipe, mesh: Mesh) -> None:
    for overrides, dtype in ((["model.compute_dtype=bfloat16"], torch.bfloat16), ([], torch.float32)):
        roles = roles_of(tiny_recipe(*BOTH, *overrides), mesh)
        module = roles["teacher"].module
        assert {p.dtype for p in adapters.base_parameters(module).values()} == {dtype}
        assert {p.dtype for name in BOTH_NAMES for p in roles[name].parameters.values()} == {torch.float32}


BOTH_NAMES = ("generator", "fake_score")


def test_only_the_named_roles_adapter_ever_takes_gradients(tiny_recipe: MakeRecipe, mesh: Mesh) -> None:
    roles = roles_of(tiny_recipe(*BOTH), mesh)
    roles.warm_up(CPU)
    for name in (*BOTH_NAMES, "teacher", None):
        roles.train_only(name)
        trainable = {id(p) for p in roles["teacher"].module.parameters() if p.requires_grad}
        own = roles[name].parameters.values() if name in BOTH_NAMES else ()
        assert trainable == {id(p) for p in own}
        assert [role.is_training for role in roles.values()] == [
            role.name == name and bool(own) for role in roles.values()
        ]


def test_optimizer_and_average_hold_the_adapter_alone(tiny_recipe: MakeRecipe, mesh: Mesh) -> None:
    """On ten layers of the one block: four in each attention, two in the feed-forward part."""
    generator = roles_of(tiny_recipe(*BOTH), mesh)["generator"]
    assert len(generator.parameters) == 2 * (2 * 4 + 2)
    assert generator.optimizer is not None and generator.ema is not None
    (group,) = generator.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in generator.parameters.values()]
    assert generator.ema.shadow.keys() == generator.parameters.keys()


def test_a_target_that_the_network_has_not_is_refused(tiny_recipe: MakeRecipe, mesh: Mesh) -> None:
    with pytest.raises(
        UserError, match=r"model\.fake_score\.lora\.targets: 'to_out' is no layer of a block; allowed: to_q"
    ):
        build_networks(tiny_recipe("model.fake_score.lora.targets=[to_out]"), mesh, ROLES)


def test_an_offloaded_teacher_is_no_base(tiny_recipe: MakeRecipe, mesh: Mesh) -> None:
    message = r"parallel\.teacher_offload = true: .* base of model\.generator\.lora and model\.fake_score\.lora too"
    with pytest.raises(UserError, match=message):
        build_networks(tiny_recipe(*BOTH, "parallel.teacher_offload=true"), mesh, ROLES)


# Checkpoints


@pytest.fixture
def trained(tiny_recipe: MakeRecipe, mesh: Mesh, pretrained: Path) -> tuple[Path, Roles]:
    """A checkpoint of adapters that are far from zero, and the roles that it was saved from."""
    recipe = tiny_recipe(*BOTH, f"model.pretrained={pretrained}")
    roles = roles_of(recipe, mesh)
    generator = torch.Generator().manual_seed(1)
    for role in roles.trained:
        for parameter in role.parameters.values():
            local = cast(Any, parameter).detach().to_local()
            local.copy_(torch.randn(local.shape, generator=generator) * 0.3)
    path = checkpoint.save(Path(recipe.run.dir), roles, step=1, stream={}, recipe=dump_recipe(recipe), keep=1)
    return path, roles


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.generator.lora.rank=5", r"is of another network: generator\.\S+ \(4, \d+\), expected \(5, \d+\)"),
        (
            "model.generator.lora.targets=[to_q]",
            r"holds tensors .*'generator': 20, .*this recipe trains .*'generator': 4, ",
        ),
        ("model.generator.lora=null", r"holds tensors .*'generator': 20, .*this recipe trains .*'generator': \d\d"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(
    trained: tuple[Path, Roles], mesh: Mesh, tiny_recipe: MakeRecipe, change: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        checkpoint.load(trained[0], roles_of(tiny_recipe(*BOTH, change), mesh))


@pytest.mark.parametrize("which", ["generator", "generator.ema", "fake_score"])
def test_a_checkpoint_is_sampled_as_the_role_ran(
    trained: tuple[Path, Roles], clip: tuple[Tensor, Tensor, Tensor], which: Any
) -> None:
    """Also the moving average, which here still is the adapter that was never trained: the base itself."""
    path, roles = trained
    role = roles["teacher" if which == "generator.ema" else which]
    roles.warm_up(CPU)
    with torch.no_grad():
        expected = role(*clip)
    torch.testing.assert_close(open_source(path).network(which, CPU)(*clip), expected, rtol=1e-5, atol=1e-5)
    assert (expected - roles["teacher"](*clip)).abs().max() > 0.1 or which == "generator.ema"


# Exports


@pytest.fixture
def found(trained: tuple[Path, Roles]) -> tuple[dict[str, Tensor], Lora, Any]:
    """The generator's adapter: tensors, description, model."""
    source = open_source(trained[0])
    lora = lora_of(source.recipe, "generator", source.model)
    assert lora is not None and lora.scale == 2
    return load_weights(source.checkpoint, "generator", source.model, lora), lora, source.model


def run(transformer: Any, clip: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    latents, sigma, text = clip
    with torch.no_grad():
        return transformer(latents, 1000 * sigma, text, return_dict=False)[0]


def test_diffusers_pipeline_loads_the_exported_adapter(
    found: tuple[dict[str, Tensor], Lora, Any], pretrained: Path, clip: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    weights, lora, model = found
    assert export_adapter(weights, lora, model, tmp_path / "lora") == len(weights)
    (file,) = (tmp_path / "lora").iterdir()
    assert file.name == "pytorch_lora_weights.safetensors"
    assert load_file(file).keys() == {f"transformer.{name}" for name in weights}
    transformer = cast(Any, WanTransformer3DModel.from_pretrained(pretrained, local_files_only=True))
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipeline = WanPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer)
    before = run(transformer, clip)
    pipeline.load_lora_weights(str(tmp_path / "lora"), local_files_only=True)
    expected = load_network(model, weights, CPU, lora=lora)(*clip)
    torch.testing.assert_close(run(transformer, clip), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.1


def test_the_merged_export_is_the_network_with_its_adapter(
    found: tuple[dict[str, Tensor], Lora, Any], clip: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    weights, lora, model = found
    export_diffusers(merge_adapter(model, weights, lora, seed=0), model, tmp_path / "merged")
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "merged", local_files_only=True)
    expected = load_network(model, weights, CPU, lora=lora)(*clip)
    torch.testing.assert_close(run(transformer, clip), expected, rtol=1e-4, atol=1e-4)


def test_a_broken_adapter_is_not_exported(found: tuple[dict[str, Tensor], Lora, Any], tmp_path: Path) -> None:
    weights, lora, model = found
    next(iter(weights.values()))[0, 0] = torch.nan
    with pytest.raises(UserError, match="not written: 1 tensors hold NaN"):
        export_adapter(weights, lora, model, tmp_path / "lora")


def test_a_pair_of_experts_exports_an_adapter_for_each(tiny_recipe: MakeRecipe, mesh: Mesh, tmp_path: Path) -> None:
    recipe = tiny_recipe("model.boundary_ratio=0.875", *BOTH)
    model, roles = build_model(recipe, "generator"), roles_of(recipe, mesh)
    assert sharing(roles) == {frozenset(ROLES)}
    roles.warm_up(CPU)
    lora = lora_of(recipe, "generator", model)
    assert lora is not None
    weights = {name: cast(Any, p).detach().full_tensor() for name, p in roles["generator"].parameters.items()}
    assert export_adapter(weights, lora, model, tmp_path / "lora") == len(weights) == 40
    for name in ("transformer", "transformer_2"):
        (file,) = (tmp_path / "lora" / name).iterdir()
        assert len(load_file(file)) == 20 and all(key.startswith("transformer.blocks.") for key in load_file(file))
