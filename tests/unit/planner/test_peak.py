"""The planned peak of a whole step against the bytes that a step on one rank really holds."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from small_wan import LiveBytes

from sgmd_dist.assemble import build_networks, build_objective
from sgmd_dist.batch import Batch
from sgmd_dist.parallel.mesh import build_mesh
from sgmd_dist.planner.machine import Machine
from sgmd_dist.planner.memory import LATENT_COPIES
from sgmd_dist.planner.plan import make_plan
from sgmd_dist.recipe import Recipe
from sgmd_dist.rng import SampleId
from sgmd_dist.stepper import Stepper

MakeRecipe = Callable[..., Recipe]
CPU = Machine(1, 1, 80, fused_norms=False)


class _Batches:
    """Endless micro-batches of latents without a file."""

    def __init__(self, recipe: Recipe, latent_shape: tuple[int, int, int, int], text_dim: int) -> None:
        self._size, self._latent_shape, self._unit = recipe.data.micro_batch_size, latent_shape, 0
        self._text = torch.zeros(1, recipe.model.text_tokens, text_dim)

    def next(self) -> Batch:
        self._unit += 1
        ids = [SampleId(0, self._unit, index) for index in range(self._size)]
        text = self._text.expand(self._size, -1, -1).clone()
        keys = [str(index) for index in range(self._size)]
        return Batch(ids, keys, self._latent_shape, text, self._text, None, torch.ones(self._size, dtype=torch.bool))


@pytest.mark.parametrize(
    "name, checkpointing",
    [("sgmd", "none"), ("sgmd", "block"), ("sgmd", "selective"), ("sid", "none"), ("sid", "block")],
)
def test_the_planned_peak_is_that_of_a_step(
    tiny_recipe: MakeRecipe, alone: torch.device, name: str, checkpointing: str
) -> None:
    """Within 5%. Many tokens and small weights, so that activations decide; latents are an allowance, left out."""
    recipe = tiny_recipe(
        f"objective={{name: {name}, fake_updates: 1}}", f"parallel.activation_checkpointing={checkpointing}",
        "data.global_batch_size=1", "data.micro_batch_size=1", "model.config.num_layers=4",
        "model.config.num_attention_heads=4", "model.config.patch_size=[1, 1, 1]",
    )  # fmt: skip
    plan = make_plan(recipe, CPU)
    with LiveBytes() as live:
        mesh = build_mesh(recipe.layout(1), alone)
        objective = build_objective(recipe)
        networks = build_networks(recipe, mesh, objective.roles)
        text_dim = networks["generator"][1].text_dim()
        stepper = Stepper(recipe, mesh, objective, networks, _Batches(recipe, plan.latent_shape, text_dim))
        stepper.train_step()
        gc.collect()
        live.peak = live.now
        stepper.train_step()
    fullest = max(plan.phases, key=lambda phase: phase.peak)
    latents = 4 * torch.Size(plan.latent_shape).numel()
    assert live.peak == pytest.approx(fullest.peak - LATENT_COPIES * latents, rel=0.05)
