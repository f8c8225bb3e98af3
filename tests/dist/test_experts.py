"""A model of two experts by noise level: sharded training equals plain training, and one expert at a time is gathered."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from reference import Reference
from running import State, max_difference, parameter_difference, train, train_unsaved
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from sgmd_dist import checkpoint
from sgmd_dist.models._wan_experts import Experts
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.trainer import Trainer

TOLERANCE = 1e-6
EXPERTS = ("high", "low")
LAYOUTS = {
    "1 rank": (1, []),
    "2 ranks": (2, ["parallel.activation_checkpointing=block", "parallel.teacher_offload=true"]),
    "ulysses 2": (2, ["parallel.ulysses=2"]),
    "hsdp 2 x 2": (4, ["parallel.dp_replicate=2"]),
}
VARIANTS = {
    "one group": ["data.global_batch_size=4", "run.steps=3"],
    "diversity, two groups, reuse": [
        "data.global_batch_size=4",
        "run.steps=3",
        "objective.exit_groups=2",
        "objective.diversity.weight=0.05",
        "objective.inner_sample=reuse",
    ],
}
_references: dict[str, State] = {}


@pytest.fixture
def pair(pair_folder: Path) -> list[str]:
    return [f"model.pretrained={pair_folder}"]


def reference(recipe_path: Path, variant: str, pair: list[str]) -> State:
    """The plain trainer's result, computed once per variant."""
    if variant not in _references:
        torch.set_num_threads(1)
        _references[variant] = Reference(load_recipe(recipe_path, [*pair, *VARIANTS[variant]])).train()
    return _references[variant]


def parameters(state: State) -> State:
    return {name: part for name, part in state.items() if not name.endswith(".optimizer")}


# Equality


@pytest.mark.parametrize(
    "variant, layout",
    [
        *(("one group", layout) for layout in LAYOUTS),
        *(("diversity, two groups, reuse", layout) for layout in ("1 rank", "2 ranks")),
    ],
)
def test_ranks_equal_one_plain_process(recipe_path: Path, pair: list[str], variant: str, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    state = run_ranks(ranks, train_unsaved, recipe_path, [*pair, *VARIANTS[variant], *parallel])[0]
    expected = reference(recipe_path, variant, pair)
    assert parameter_difference(parameters(state), expected) < TOLERANCE
    for role in ("generator", "fake_score"):
        for expert in EXPERTS:
            steps = {float(v) for k, v in state[f"{role}.optimizer"].items() if k.startswith(expert) and "step" in k}
            assert len(steps) == 1, "an expert's parameters step together"


def test_an_expert_that_takes_no_part_in_a_step_stays_as_it_was(recipe_path: Path, pair: list[str]) -> None:
    """With one group a step has one exit and one draw of the fake score's levels: an expert may miss it. Neither
    AdamW's moments nor weight decay move it then."""
    after = [
        run_ranks(2, train_unsaved, recipe_path, [*pair, *VARIANTS["one group"], f"run.steps={n}", f"run.dir={recipe_path}.{n}"])
        for n in (1, 2)
    ]
    (one,), (two,) = ([state for state in states if state] for states in after)
    for role in ("generator", "fake_score"):
        counts = [{e: int(s[f"{role}.optimizer"][f"{e}.proj_out.bias.step"]) for e in EXPERTS} for s in (one, two)]
        assert [sum(count.values()) for count in counts] == [1, 2]
        for expert in EXPERTS:
            moved = any(
                not torch.equal(one[role][k], two[role][k]) for k in one[role] if k.startswith(f"{expert}.")
            )
            assert moved == (counts[1][expert] > counts[0][expert])


# Resume


def test_a_resumed_run_has_the_same_bits_though_its_experts_stepped_unevenly(recipe_path: Path, pair: list[str]) -> None:
    overrides = [*pair, *VARIANTS["one group"], "run.steps=2", "checkpoint.every=1"]
    quiet = run_ranks(2, train, recipe_path, [*overrides, f"run.dir={recipe_path.parent}/quiet"])[0]
    first = checkpoint.committed(recipe_path.parent / "quiet")[0]  # after it an expert has never stepped
    resumed = run_ranks(2, train, recipe_path, [*overrides, f"run.resume={first}"])[0]
    assert set(max_difference(quiet, resumed).values()) == {0.0}
    one = run_ranks(1, train, recipe_path, [*overrides, f"run.resume={first}", f"run.dir={recipe_path.parent}/one"])[0]
    assert parameter_difference(quiet, one) < TOLERANCE


# What is gathered


class Gathers:
    """Counts the all-gathers of the FSDP units of each expert."""

    def __init__(self, module: Experts) -> None:
        self.counts: Counter[str] = Counter()
        for name in EXPERTS:
            for part in getattr(module, name).modules():
                if isinstance(part, FSDPModule):
                    self._count(name, part._get_fsdp_state()._fsdp_param_group)

    def _count(self, name: str, group: FSDPParamGroup) -> None:
        unshard = group.unshard

        def counted(*args: bool) -> None:
            if group.is_sharded and group._all_gather_result is None:  # neither gathered nor on its way
                self.counts[name] += 1
            unshard(*args)

        group.unshard = counted


def count_gathers(recipe_path: Path, overrides: list[str]) -> list[dict[str, int]]:
    """Units gathered by a forward at each student level, and by a forward and backward at the last."""
    recipe = load_recipe(recipe_path, overrides)
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        generator = trainer.roles["generator"]
        counts = []
        x, text = torch.zeros(1, *generator.model.smallest_latents()), torch.zeros(1, 1, generator.model.text_dim())
        trainer.roles.train_only("generator")
        gathers = Gathers(generator.module)
        for level in (1.0, 0.875, 0.625):
            with torch.no_grad():
                generator(x, torch.full((1,), level), text, level)
            counts.append(dict(gathers.counts))
            gathers.counts.clear()
        generator(x, torch.full((1,), 0.625), text, 0.625).sum().backward()
        counts.append(dict(gathers.counts))
        assert all(p.grad is None for p in generator.module.high.parameters())
        trainer.close()
        del trainer
    return counts


def test_a_pass_gathers_the_expert_that_it_runs_and_no_other(recipe_path: Path, pair: list[str]) -> None:
    """A block and the network around it: two units forward; backward gathers them again."""
    for counts in run_ranks(2, count_gathers, recipe_path, pair):
        assert counts == [{"high": 2}, {"high": 2}, {"low": 2}, {"low": 4}]
