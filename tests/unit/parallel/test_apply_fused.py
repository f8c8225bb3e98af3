"""Networks as the trainer gets them run fused operations where `parallel.kernels` and the device allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sgmd_dist.assemble import build_networks
from sgmd_dist.layout import Layout
from sgmd_dist.models import _wan_fused
from sgmd_dist.parallel.mesh import Mesh, build_mesh
from sgmd_dist.recipe import Recipe
from sgmd_kernels import dispatch

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def mesh(alone: torch.device) -> Mesh:
    layout = Layout(world_size=1, dp_replicate=1, dp_shard=1, ring=1, ulysses=1, num_units=4, accumulation=4)
    return build_mesh(layout, alone)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused operations also on this machine: the recipe alone decides."""
    monkeypatch.setattr(dispatch, "fused", lambda setting, device_type, installed: setting == "auto")


def loss_and_gradients(recipe: Recipe, mesh: Mesh) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of a generator whose output projection is not zero, as random ones' is."""
    network, model = build_networks(recipe, mesh, {"generator": True})["generator"]
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.constant_(network.get_parameter("proj_out.weight"), 0.1)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((2, 3, 2, 4, 4), (2, 8, 32)))
    loss = model.velocity(network, latents, torch.tensor([0.3, 0.9]), text).square().mean()
    loss.backward()
    gradients: list[Any] = [parameter.grad for parameter in network.parameters()]
    return loss.detach(), [gradient.full_tensor() for gradient in gradients]


@pytest.mark.parametrize("overrides", [(), ("parallel.activation_checkpointing=none",)], ids=["checkpointed", ""])
def test_a_sharded_network_has_the_same_loss_and_gradients_with_fused_operations(
    tiny_recipe: MakeRecipe, mesh: Mesh, allowed: None, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    original = _wan_fused.adaln
    monkeypatch.setattr(_wan_fused, "adaln", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    plain = loss_and_gradients(tiny_recipe("parallel.kernels=off", *overrides), mesh)
    assert not calls
    fused = loss_and_gradients(tiny_recipe("parallel.kernels=auto", *overrides), mesh)
    assert calls
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device")
def test_on_a_cpu_blocks_are_diffusers_own(tiny_recipe: MakeRecipe, mesh: Mesh, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_wan_fused, "fuse", lambda module: pytest.fail("fused on a CPU"))
    build_networks(
        tiny_recipe("parallel.kernels=auto", "parallel.activation_checkpointing=none"), mesh, {"teacher": False}
    )


@pytest.mark.parametrize("spelling", ["off", "'off'", "false"])
def test_a_bare_off_in_a_recipe_is_off(tiny_recipe: MakeRecipe, spelling: str):
    assert tiny_recipe(f"parallel.kernels={spelling}").parallel.kernels == "off"
