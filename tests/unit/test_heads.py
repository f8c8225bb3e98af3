"""A head on a network's blocks: what it computes, when it runs, whose gradients it makes, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from sgmd_dist import checkpoint, heads
from sgmd_dist.assemble import build_model, build_networks, load_weights, plan_networks
from sgmd_dist.errors import UserError
from sgmd_dist.layout import Layout
from sgmd_dist.models.base import VideoModel
from sgmd_dist.objectives.dmd2 import GanSection
from sgmd_dist.parallel.mesh import Mesh, build_mesh
from sgmd_dist.planner.machine import Machine
from sgmd_dist.planner.plan import make_plan
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import dump_recipe
from sgmd_dist.roles import Roles, build_roles
from sgmd_dist.sampling import Source

MakeRecipe = Callable[..., Recipe]
ROLES = {"teacher": False, "generator": True, "fake_score": True}
TRAINED = {"generator", "fake_score"}
OBJECTIVE = "objective={name: dmd2, gan: {weight: 0.1, width: 8, lr_ratio: 4.0}}"
TWO_BLOCKS = "model.config.num_layers=2"
LATENTS, LENGTH = (2, 3, 2, 4, 6), 12  # B, C, F, H, W and its tokens, of patches 1 x 2 x 2


@pytest.fixture(scope="module")
def mesh(alone: torch.device) -> Mesh:
    layout = Layout(world_size=1, dp_replicate=1, dp_shard=1, ring=1, ulysses=1, num_units=4, accumulation=4)
    return build_mesh(layout, alone)


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe) -> Recipe:
    return tiny_recipe(OBJECTIVE, TWO_BLOCKS)


def make_roles(recipe: Recipe, mesh: Mesh) -> Roles:
    roles = build_roles(build_networks(recipe, mesh, ROLES), TRAINED, recipe.optim, 10, recomputes=False)
    roles.warm_up(mesh.device)
    return roles


def inputs(*, level: float = 0.5, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor, float]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(LATENTS, generator=draw).requires_grad_(requires_grad)
    return x, torch.full((2,), level), torch.randn(2, 8, 32, generator=draw), level


def head_of(roles: Roles) -> heads.Head:
    [head] = heads.heads_of(roles["fake_score"].module)
    return head


# What it computes, and when


def test_the_logit_is_that_of_the_blocks_tokens(recipe: Recipe, mesh: Mesh) -> None:
    roles = make_roles(recipe, mesh)
    fake, head, seen = roles["fake_score"], head_of(roles), []
    for block in fake.model.blocks(fake.module):
        block.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    with torch.no_grad():
        velocity, logits = fake.judge(*inputs())
        pooled = []
        for tokens, norm, projection in zip(seen, head.norms, head.projections, strict=True):
            assert tokens.shape[:2] == (2, LENGTH)
            normed = nn.functional.layer_norm(tokens, tokens.shape[-1:], full(norm.weight), full(norm.bias))
            pooled.append(silu(normed @ full(projection.weight).T + full(projection.bias)).mean(1))
        hidden = silu(torch.cat(pooled, 1) @ full(head.mix.weight).T + full(head.mix.bias))
        expected = (hidden @ full(head.logit.weight).T + full(head.logit.bias))[:, 0]
        torch.testing.assert_close(logits, expected)
        assert torch.equal(velocity, fake(*inputs())), "the velocity is what it is without being judged"


def full(parameter: Any) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def test_a_head_that_is_not_asked_does_not_run(recipe: Recipe, mesh: Mesh) -> None:
    roles = make_roles(recipe, mesh)
    head_of(roles).register_forward_hook(lambda *_: pytest.fail("the head ran"))
    roles["fake_score"](*inputs())


def test_a_pass_that_judges_counts_as_a_pass(recipe: Recipe, mesh: Mesh) -> None:
    roles = make_roles(recipe, mesh)
    roles.train_only("generator")
    roles["fake_score"].judge(*inputs(requires_grad=True))
    assert roles.take_passes() == {"teacher": 0, "generator": 0, "fake_score": 2 * 2}


@pytest.mark.parametrize(
    "num_blocks, expected", [(1, (0,)), (2, (0, 1)), (3, (1, 2)), (30, (14, 22, 29)), (40, (19, 29, 39))]
)
def test_it_reads_the_ends_of_three_quarters_by_default(num_blocks: int, expected: tuple[int, ...]) -> None:
    assert heads.read_blocks(GanSection(), num_blocks) == expected
    assert heads.read_blocks(GanSection(blocks=[0]), num_blocks) == (0,)


# Gradients


def test_a_frozen_network_hands_the_gradient_to_its_input_alone(recipe: Recipe, mesh: Mesh) -> None:
    roles = make_roles(recipe, mesh)
    roles.train_only("generator")
    x, *rest = inputs(requires_grad=True)
    _, logits = roles["fake_score"].judge(x, *rest)
    logits.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert all(p.grad is None for p in roles["fake_score"].parameters.values())


@pytest.mark.parametrize("detached", [False, True])
def test_the_head_and_the_blocks_learn_unless_the_tokens_are_detached(
    recipe: Recipe, mesh: Mesh, detached: bool
) -> None:
    roles = make_roles(recipe, mesh)
    roles.train_only("fake_score")
    _, logits = roles["fake_score"].judge(*inputs(), detached=detached)
    logits.square().sum().backward()
    learn = {name.split(".")[0] for name, p in roles["fake_score"].parameters.items() if p.grad is not None}
    assert learn >= {"head"} and ("blocks" in learn) != detached


def test_logits_are_float32_under_bfloat16(tiny_recipe: MakeRecipe, mesh: Mesh) -> None:
    roles = make_roles(tiny_recipe(OBJECTIVE, TWO_BLOCKS, "model.compute_dtype=bfloat16"), mesh)
    roles.train_only("fake_score")
    _, logits = roles["fake_score"].judge(*inputs())
    logits.sum().backward()
    assert logits.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in head_of(roles).parameters())


def test_a_head_has_its_own_learning_rate(recipe: Recipe, mesh: Mesh) -> None:
    roles = make_roles(recipe, mesh)
    fake, of_head = roles["fake_score"], {id(p) for p in head_of(roles).parameters()}
    assert fake.optimizer is not None
    for parameter in fake.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    roles.step("fake_score", 0)
    lrs = {id(p) in of_head: group["lr"] for group in fake.optimizer.param_groups for p in group["params"]}
    assert lrs == {True: pytest.approx(4 * 2e-6), False: pytest.approx(2e-6)}


def test_compiled_blocks_give_the_same_logits_and_gradients(
    recipe: Recipe, mesh: Mesh, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.compile captures of a block is run as it is: it is the hooks on blocks that might be lost."""
    run_as_captured = partial(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", lambda module: run_as_captured(module))
    compiled = tiny_recipe(OBJECTIVE, TWO_BLOCKS, "parallel.compile=true")
    results = []
    for each in (recipe, compiled):
        roles = make_roles(each, mesh)
        roles.train_only("fake_score")
        _, logits = roles["fake_score"].judge(*inputs())
        logits.square().sum().backward()
        gradients = {k: full(p.grad) for k, p in roles["fake_score"].parameters.items() if p.grad is not None}
        results.append((logits.detach(), gradients))
    torch.testing.assert_close(*results)


# Experts


def test_each_expert_has_a_head_and_the_one_that_runs_answers(tiny_recipe: MakeRecipe, mesh: Mesh) -> None:
    roles = make_roles(tiny_recipe(OBJECTIVE, "model.boundary_ratio=0.5"), mesh)
    fake = roles["fake_score"]
    assert {name.split(".")[0] for name in heads.parameters(fake.module)} == {"high", "low"}
    roles.train_only("fake_score")
    for level, expert in ((0.7, "high"), (0.2, "low")):
        _, logits = fake.judge(*inputs(level=level))
        logits.sum().backward()
        learn = {name.split(".")[0] for name, p in fake.parameters.items() if p.grad is not None}
        assert learn == {expert}
        fake.module.zero_grad(set_to_none=True)


# Weights, checkpoints, plans


def test_only_the_fake_score_has_one_and_its_network_is_what_it_is_without(
    recipe: Recipe, tiny_recipe: MakeRecipe, mesh: Mesh
) -> None:
    plain = build_networks(tiny_recipe("objective.name=dmd2", TWO_BLOCKS), mesh, ROLES)
    for name, (module, _) in build_networks(recipe, mesh, ROLES).items():
        of_head = heads.parameters(module)
        assert bool(of_head) == (name == "fake_score")
        theirs = dict(plain[name][0].named_parameters())
        found = {key: p for key, p in module.named_parameters() if key not in of_head}
        assert found.keys() == theirs.keys()
        assert all(torch.equal(full(p), full(theirs[key])) for key, p in found.items())


def test_pretrained_weights_lack_the_head_which_is_made(tiny_recipe: MakeRecipe, mesh: Mesh, tmp_path: Path) -> None:
    random = tiny_recipe("objective.name=dmd2", TWO_BLOCKS)
    module, model = build_networks(random, mesh, {"generator": True})["generator"]
    model.export({name: full(p).detach() for name, p in module.named_parameters()}, tmp_path / "wan")
    recipe = tiny_recipe(OBJECTIVE, TWO_BLOCKS, f"model.pretrained={tmp_path / 'wan'}")
    fake, _ = build_networks(recipe, mesh, ROLES)["fake_score"]
    again, _ = build_networks(recipe, mesh, ROLES)["fake_score"]
    for name, p in heads.parameters(fake).items():
        assert torch.equal(full(p), full(heads.parameters(again)[name])), "a function of the seed"
        assert full(p).any() == (p.ndim == 2 or (".norms." in name and name.endswith("weight")))


def test_a_checkpoint_holds_the_head_and_gives_the_network_without(recipe: Recipe, mesh: Mesh) -> None:
    roles = make_roles(recipe, mesh)
    parameters = roles["fake_score"].parameters
    tree = checkpoint.training_state(roles)
    of_head = {name for name in tree["fake_score"] if name.startswith("head.")}
    assert of_head == heads.parameters(roles["fake_score"].module).keys()
    assert "head.logit.bias.exp_avg" in tree["fake_score.optimizer"]
    path = checkpoint.save(Path(recipe.run.dir), roles, step=1, stream={}, recipe=dump_recipe(recipe), keep=1)
    model = build_model(recipe, "fake_score")
    weights = load_weights(path, "fake_score", model, head=recipe.objective.head_of("fake_score"))
    assert weights.keys() == {name for name in parameters if not name.startswith("head.")}
    with torch.no_grad():
        ours = Source(recipe, path, model).network("fake_score", mesh.device)(*inputs())
        torch.testing.assert_close(ours, roles["fake_score"](*inputs()))


def test_a_plan_counts_the_heads_parameters_and_passes(recipe: Recipe, mesh: Mesh, tiny_recipe: MakeRecipe) -> None:
    machine = Machine(1, 1, 80.0)
    plan, plain = (make_plan(r, machine) for r in (recipe, tiny_recipe("objective.name=dmd2", TWO_BLOCKS)))
    ours, theirs = ({role.role: role.num_parameters for role in p.roles} for p in (plan, plain))
    module, _ = build_networks(recipe, mesh, ROLES)["fake_score"]
    expected = sum(p.numel() for p in heads.parameters(module).values())
    more = {name: ours[name] - theirs[name] for name in ours}
    assert more == {"teacher": 0, "generator": 0, "fake_score": expected}
    # With recomputation: an input gradient for the generator, and in five updates real samples beside the generated.
    assert plan.passes["fake_score"][0] - plain.passes["fake_score"][0] == (1 + 1) + 5 * 4


# Refusals


def refusal(recipe: Recipe) -> str:
    with pytest.raises(UserError) as error:
        plan_networks(recipe, ROLES)
    return str(error.value)


def test_a_block_that_is_not_there_is_refused(tiny_recipe: MakeRecipe) -> None:
    assert refusal(tiny_recipe("objective={name: dmd2, gan: {weight: 0.1, blocks: [0, 7]}}", TWO_BLOCKS)) == (
        "objective.gan.blocks: 7: expected numbers from 0 to 1: the network has 2 blocks"
    )


def test_a_fake_score_that_trains_an_adapter_is_refused(tiny_recipe: MakeRecipe) -> None:
    message = refusal(tiny_recipe(OBJECTIVE, "model.fake_score.lora.rank=2"))
    assert message.startswith("model.fake_score.lora: objective.gan puts a head on this role's network")
    plan_networks(tiny_recipe(OBJECTIVE, "model.generator.lora.rank=2"), ROLES)


def test_a_models_blocks_are_named_by_the_model(recipe: Recipe) -> None:
    """`VideoModel` alone says which networks and blocks there are."""
    model = cast(VideoModel, build_model(recipe, "fake_score"))
    with torch.device("meta"):
        module = model.build()
        section = recipe.objective.head_of("fake_score")
        assert section is not None
        heads.inject(module, model, section)
    assert [len(block._forward_hooks) for block in model.blocks(module)] == [1, 1]
