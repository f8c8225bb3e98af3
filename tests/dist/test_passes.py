"""Network passes of one optimizer step, counted by hooks on the networks: the budget of the design."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from ranks import run_ranks
from torch import Tensor, nn

from sgmd_dist.objectives._distillation import Distillation
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.trainer import Trainer

K = 4
FRESH_F, REUSE_F = 17.0, 14.5


class PassCounter:
    """Counts, on one linear layer of a block, forwards (recomputations too) and both kinds of backward, in samples."""

    def __init__(self, layer: nn.Module) -> None:
        self.counts: Counter[str] = Counter()
        self._hooked: set[int] = set()
        layer.register_forward_hook(self._forward)

    def _forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        size = inputs[0].shape[0]
        self.counts["forward"] += size
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: self.counts.update(input=size))
        if layer.weight.requires_grad and id(layer.weight) not in self._hooked:
            self._hooked.add(id(layer.weight))  # FSDP gathers into the same parameter each time
            layer.weight.register_hook(lambda _: self.counts.update(weight=size))


def count_passes(recipe_path: Path, overrides: list[str], exits: list[int]) -> list[dict[str, Counter[str]]]:
    """Passes of an optimizer step per micro-batch sample and role, for each exit index."""
    recipe = load_recipe(recipe_path, overrides)
    with process_group() as device:
        trainer = Trainer(recipe, build_mesh(recipe.layout(world_size()), device))
        counters = {
            name: PassCounter(role.module.blocks[0].ffn.net[2]) for name, role in trainer.roles.items()
        }
        samples, found = recipe.data.global_batch_size // world_size(), []
        for exit_index in exits:
            Distillation.exit_index = lambda *args, index=exit_index, **kwargs: index
            trainer.train_step()
            assert {name: sum(c.counts.values()) for name, c in counters.items()} == trainer.roles.take_passes()
            found.append({name: Counter({k: v / samples for k, v in c.counts.items()}) for name, c in counters.items()})
            for counter in counters.values():
                counter.counts.clear()
        trainer.close()
        del trainer
    return found


@pytest.mark.parametrize("inner_sample, expected", [("fresh", FRESH_F), ("reuse", REUSE_F)])
def test_an_sgmd_step_takes_the_planned_passes(recipe_path: Path, inner_sample: str, expected: float) -> None:
    """Mean over the K exit steps, each exact: fresh 2k + 14, reuse k + 13, with recomputation and a guided teacher."""
    overrides = [f"objective.inner_sample={inner_sample}", "parallel.activation_checkpointing=block"]
    totals = []
    for exit_index, roles in enumerate(run_ranks(2, count_passes, recipe_path, overrides, list(range(K)))[0]):
        totals.append(sum(sum(counts.values()) for counts in roles.values()))
        assert totals[-1] == (2 * exit_index + 14 if inner_sample == "fresh" else exit_index + 13)
        assert roles["teacher"] == {"forward": 2}
        # 4 passes with gradients: forward + recomputation in each phase; weights in the fake score's own phase only.
        assert roles["fake_score"] == {"forward": 4, "input": 2, "weight": 1}
    assert sum(totals) / K == expected


def test_a_dmd2_step_takes_the_planned_passes(recipe_path: Path) -> None:
    """5:1 with own rollouts at a mean exit of 1.5: 41 F as published; here exactly for exit 1."""
    overrides = ["objective={name: dmd2}", "parallel.activation_checkpointing=block"]
    (roles,) = run_ranks(2, count_passes, recipe_path, overrides, [1])[0]
    generator = (1 + 1) + 3 + 5 * (1 + 1)
    assert sum(sum(counts.values()) for counts in roles.values()) == generator + 2 + 1 + 5 * 4


def test_without_checkpointing_nothing_is_run_twice(recipe_path: Path) -> None:
    (roles,) = run_ranks(1, count_passes, recipe_path, ["objective.inner_sample=reuse"], [0])[0]
    assert sum(sum(counts.values()) for counts in roles.values()) == 10
