"""What a run of two experts leaves behind: its checkpoint samples, and its export is a model that samples the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sgmd_dist import checkpoint
from sgmd_dist.assemble import build_networks, load_weights
from sgmd_dist.export import export_diffusers
from sgmd_dist.layout import Layout
from sgmd_dist.parallel.mesh import build_mesh
from sgmd_dist.prompts import Prompts
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import dump_recipe
from sgmd_dist.roles import build_roles
from sgmd_dist.rollout import Network
from sgmd_dist.sampling import Source, open_source, sample_videos

CPU = torch.device("cpu")
BOUNDARY = "model.boundary_ratio=0.875"


@pytest.fixture
def source(tiny_recipe: Callable[..., Recipe], alone: torch.device, optimizer_step: Callable[..., None]) -> Source:
    """A checkpoint after one step of a generator whose experts began with random weights."""
    recipe = tiny_recipe(BOUNDARY)
    layout = Layout(world_size=1, dp_replicate=1, dp_shard=1, ring=1, ulysses=1, num_units=4, accumulation=4)
    networks = build_networks(recipe, build_mesh(layout, alone), {"generator": True})
    roles = build_roles(networks, {"generator"}, recipe.optim, 10, recomputes=False)
    optimizer_step(roles)
    checkpoint.save(Path(recipe.run.dir), roles, step=1, stream={}, recipe=dump_recipe(recipe), keep=1)
    return open_source(Path(recipe.run.dir))


def videos(network: Network, num_steps: int, guidance_scale: float = 1.0) -> torch.Tensor:
    embeds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(["a", "b"], embeds, torch.zeros(1, 8, 32))
    return sample_videos(
        network, prompts, (3, 1, 4, 4), num_steps=num_steps, shift=5.0, seed=0, guidance_scale=guidance_scale
    )


def test_a_checkpoint_of_experts_samples_with_few_steps_and_its_teacher_with_many(source: Source) -> None:
    few = videos(source.network("generator", CPU), 4)
    average = videos(source.network("generator.ema", CPU), 4)
    many = videos(source.teacher(CPU), 20, guidance_scale=3.0)
    assert few.isfinite().all() and many.isfinite().all()
    assert few.shape == many.shape == (2, 3, 1, 4, 4) and not torch.equal(few, average)


def test_an_exported_pair_samples_as_its_checkpoint_does(
    source: Source, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    out = tmp_path / "export"
    weights = load_weights(source.checkpoint, "generator", source.model)
    assert export_diffusers(weights, source.model, out) == len(weights)
    assert sorted(path.name for path in out.iterdir()) == ["model_index.json", "transformer", "transformer_2"]
    again = Source(tiny_recipe(f"model.pretrained={out}", "model.config=null"), source.checkpoint, source.model)
    expected = videos(source.network("generator", CPU), 4)
    assert torch.equal(videos(again.beginning(CPU), 4), expected)
