"""Plans of the shipped recipes, and advice that is planned anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sgmd_dist.errors import UserError
from sgmd_dist.planner.advice import advise, apply
from sgmd_dist.planner.machine import GIB, Machine
from sgmd_dist.planner.plan import Plan, make_plan
from sgmd_dist.planner.report import table, write_json
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[3]
EIGHT_NODES = Machine(nodes=8, gpus_per_node=8, gpu_memory=80)
MakeRecipe = Callable[..., Recipe]


def shipped(name: str, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)


@pytest.fixture(scope="module")
def plan_14b() -> Plan:
    return make_plan(shipped("sgmd"), EIGHT_NODES)


def test_the_14b_recipe_fits_its_machine(plan_14b: Plan) -> None:
    """38 bytes for each of 14.29 billion parameters on 64 ranks: 8.48 GB."""
    assert plan_14b.fits
    total = sum(role.total for role in plan_14b.roles)
    assert total == pytest.approx(38 * 14_288_491_584 / 64, rel=1e-2)
    assert sum(mean for mean, _ in plan_14b.passes.values()) == 17


def test_a_14b_step_gathers_each_pass_and_reduces_each_training_pass(plan_14b: Plan) -> None:
    """4 micro-batches; 1.5 + 1.5 + 1 + 1 forwards without a graph, 3 graphs; weights of two networks are trained."""
    sent = {flow.kind: flow.sent_bytes for flow in plan_14b.flows}
    one = 14_288_491_584 * 63 / 64
    assert sent["all-gather"] == pytest.approx(4 * (5 + 2 * 3) * 2 * one, rel=1e-2)
    assert sent["reduce-scatter"] == pytest.approx(4 * 2 * 4 * one, rel=1e-2)
    assert set(sent) == {"all-gather", "reduce-scatter"}


def test_a_step_is_what_its_passes_compute(plan_14b: Plan) -> None:
    """11 forwards, recomputed blocks of 3 graphs, 2.5 times the attention and once or twice the rest backward."""
    flops, layout = plan_14b.flops, plan_14b.layout
    one = plan_14b.planned[0].passes[0].costs
    assert flops.linear == pytest.approx(layout.accumulation * (9 + 1 + 2 * 2) * one.linear.forward, rel=1e-2)
    attention = one.self_attention.forward + one.cross_attention.forward
    assert flops.attention == pytest.approx(layout.accumulation * (9 + 3 * 2.5) * attention)
    assert flops.recomputed == pytest.approx(layout.accumulation * 3 * (one.linear.forward + attention))
    assert plan_14b.compute_seconds == pytest.approx(flops.total / (0.4 * 989e12))


def test_sequences_on_more_ranks_hold_less_and_exchange_more() -> None:
    alone = make_plan(shipped("sgmd"), EIGHT_NODES)
    shared = make_plan(shipped("sgmd", "parallel.ulysses=4", "parallel.ring=2"), EIGHT_NODES)
    assert shared.phases[0].moment.activations < alone.phases[0].moment.activations / 7
    assert {flow.kind for flow in shared.flows} - {flow.kind for flow in alone.flows} == {
        "all-to-all", "ring hops", "output gather"
    }  # fmt: skip
    assert [flow.crosses_nodes for flow in shared.flows if flow.kind == "all-to-all"] == [False]


@pytest.mark.parametrize(
    "setting, cheaper, dearer",
    [
        ("parallel.activation_checkpointing=selective", "step_seconds", "peak_bytes"),
        ("parallel.activation_checkpointing=none", "step_seconds", "peak_bytes"),
        ("parallel.reshard_after_forward=8", "hidden_seconds", "peak_bytes"),
        ("parallel.teacher_offload=true", "peak_bytes", "hidden_seconds"),
        ("parallel.backward_prefetch=0", "peak_bytes", None),
    ],
)
def test_every_knob_buys_one_thing_with_another(plan_14b: Plan, setting: str, cheaper: str, dearer: str | None) -> None:
    plan = make_plan(shipped("sgmd", setting), EIGHT_NODES)
    assert getattr(plan, cheaper) < getattr(plan_14b, cheaper)
    assert dearer is None or getattr(plan, dearer) > getattr(plan_14b, dearer)


def test_an_offloaded_teacher_lies_on_the_host(plan_14b: Plan) -> None:
    plan = make_plan(shipped("sgmd", "parallel.teacher_offload=true"), EIGHT_NODES)
    assert plan.storage.offloaded == plan_14b.roles[0].parameters == plan.roles[0].on_host
    assert plan.roles[0].parameters == 0
    assert plan.storage.node == 8 * (plan.storage.loading + plan.storage.staging + plan.storage.offloaded)


def test_a_checkpoint_holds_the_training_state_in_float32(plan_14b: Plan) -> None:
    """Weights and two moments of two networks and one average: 28 bytes a parameter."""
    assert plan_14b.storage.checkpoint == pytest.approx(28 * 14_288_491_584, rel=1e-6)
    assert plan_14b.storage.checkpoints == 3 * plan_14b.storage.checkpoint
    assert plan_14b.storage.export == 4 * 14_288_491_584


# Advice


def test_advice_makes_fit_what_did_not() -> None:
    recipe = shipped("sgmd", "parallel.activation_checkpointing=none")
    assert not make_plan(recipe, EIGHT_NODES).fits
    advice = advise(recipe, EIGHT_NODES)
    assert advice.remedy is not None
    assert advice.remedy.settings == ("parallel.activation_checkpointing=block",)
    again = make_plan(shipped("sgmd", *advice.remedy.settings), EIGHT_NODES)
    assert again.fits and again.peak_bytes == advice.remedy.plan.peak_bytes


def test_advice_takes_several_knobs_where_one_is_not_enough() -> None:
    recipe, machine = shipped("sgmd_wan2.1_1.3b", "parallel.activation_checkpointing=none"), Machine(1, 8, 20)
    advice = advise(recipe, machine)
    assert advice.remedy is not None and len(advice.remedy.settings) > 1
    assert not any(change.plan.fits for change in advice.changes if len(change.settings) == 1)
    changed, on = apply(advice.remedy.settings, recipe, machine)
    assert make_plan(changed, on).fits


def test_advice_says_so_where_nothing_helps(tiny_recipe: MakeRecipe) -> None:
    recipe, machine = tiny_recipe(), Machine(1, 1, 1e-4)
    advice = advise(recipe, machine)
    assert advice.remedy is None
    assert "Nothing here makes it fit" in table(make_plan(recipe, machine), advice)


# Messages and reports


def test_a_machine_that_the_recipe_does_not_divide_over_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.global_batch_size = 256 is not a multiple of"):
        make_plan(shipped("sgmd"), replace(EIGHT_NODES, nodes=3))


def test_the_json_holds_every_number(plan_14b: Plan, tmp_path: Path) -> None:
    write_json(plan_14b, None, tmp_path / "plans" / "14b.json")
    content = json.loads((tmp_path / "plans" / "14b.json").read_text())
    assert content["peak_bytes"] == plan_14b.peak_bytes and content["fits"] is True
    assert [role["role"] for role in content["roles"]] == ["teacher", "generator", "fake_score"]
    assert f"{plan_14b.peak_bytes / GIB:.1f} GiB" in table(plan_14b, None)


def test_a_tiny_recipe_is_planned_on_one_gpu(tiny_recipe: MakeRecipe) -> None:
    plan = make_plan(tiny_recipe(), Machine(1, 1, 1))
    assert plan.fits and plan.flows == ()
    assert "Communication: none" in table(plan, None)


def test_adapters_are_advised_where_state_is_too_much() -> None:
    """14B on one node of 40 GB: of the knobs that leave the machine as it is, they save most of what stays on a GPU."""
    recipe, machine = shipped("sgmd"), Machine(1, 8, 40)
    changes = {change.settings: change.plan for change in advise(recipe, machine).changes}
    plan = changes["model.generator.lora.rank=64", "model.fake_score.lora.rank=64"]
    start = make_plan(recipe, machine)
    resident, before = (sum(role.resident for role in each.roles) for each in (plan, start))
    base = next(role for role in plan.roles if role.role == "teacher")
    assert base.num_parameters == 14_288_491_584 and resident < before / 8


def test_adapters_are_combined_with_what_they_allow() -> None:
    """Two GPUs of 48 GB cannot hold the state of 14B in full; adapters with shared videos fit, without an offload."""
    advice = advise(shipped("sgmd"), Machine(1, 2, 48))
    assert advice.remedy is not None and advice.remedy.plan.fits
    assert "model.generator.lora.rank=64" in advice.remedy.settings and "--nodes" not in str(advice.remedy.settings)
