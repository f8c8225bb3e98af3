"""Wan on fused operations: diffusers' numbers, forward and backward, through the references on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgmd_dist import adapters
from sgmd_dist.models import _wan_fused
from sgmd_dist.models._wan_attention import attach
from sgmd_dist.models.wan import WanConfig
from sgmd_dist.parallel.sequence import SequenceAxis

CONFIG = WanConfig(
    num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, ffn_dim=48, num_layers=2
)
TIMESTEPS = {"a timestep per sample": (2,), "a timestep per token": (2, 12)}


def network(dtype: torch.dtype = torch.float32) -> Any:
    """A network of random weights, norms included, as the trainer's: the rotary tables stay float32."""
    torch.manual_seed(0)
    module = WanTransformer3DModel.from_config(CONFIG.model_dump())
    assert isinstance(module, nn.Module)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def fused(dtype: torch.dtype = torch.float32) -> Any:
    module = network(dtype)
    attach(module, SequenceAxis(None))
    _wan_fused.fuse(module)
    return module


def forward_and_gradients(module: Any, timestep_shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradient of the latents and of every parameter, in float32 on the CPU."""
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 2, 4, 6, generator=generator).to(device, dtype).requires_grad_()
    prompt_embeds = torch.randn(2, 5, 16, generator=generator).to(device, dtype)
    timestep = 1000 * torch.rand(timestep_shape, generator=generator).to(device)
    output = module(latents, timestep, prompt_embeds, return_dict=False)[0]
    output.backward(torch.randn(output.shape, generator=generator).to(device, dtype))
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    found = {"output": output.detach(), "latents": latents.grad, **gradients}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def distances(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest error over the largest value, of each tensor."""
    assert found.keys() == wanted.keys()
    return {name: ((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()).item() for name in wanted}


@pytest.fixture(params=TIMESTEPS.values(), ids=TIMESTEPS)
def timestep_shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


def test_a_fused_network_gives_diffusers_numbers(timestep_shape: tuple[int, ...]):
    wanted = forward_and_gradients(network(), timestep_shape, torch.float32)
    found = distances(forward_and_gradients(fused(), timestep_shape, torch.float32), wanted)
    assert max(found.values()) < 5e-6, found


def test_in_bfloat16_a_fused_network_is_as_near_to_float32_as_diffusers(timestep_shape: tuple[int, ...]):
    half = torch.bfloat16
    exact = network(half).float()  # the same rounded weights
    wanted = forward_and_gradients(exact, timestep_shape, torch.float32)
    theirs = distances(forward_and_gradients(network(half), timestep_shape, half), wanted)
    ours = distances(forward_and_gradients(fused(half), timestep_shape, half), wanted)
    assert sum(ours.values()) < 1.1 * sum(theirs.values())
    assert ours["output"] < 1.5 * theirs["output"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_kernels_are_as_near_to_float32_as_diffusers(timestep_shape: tuple[int, ...]):
    half = torch.bfloat16
    wanted = forward_and_gradients(network(half).float(), timestep_shape, torch.float32)
    theirs = distances(forward_and_gradients(network(half).cuda(), timestep_shape, half), wanted)
    ours = distances(forward_and_gradients(fused(half).cuda(), timestep_shape, half), wanted)
    assert sum(ours.values()) < 1.1 * sum(theirs.values())


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the fused operations, as they are called."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Tensor]:
        original = getattr(_wan_fused, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return original(*args, **kwargs)

        return call

    for name in ("adaln", "gated_residual", "rms_norm_rope"):
        monkeypatch.setattr(_wan_fused, name, counted(name))
    return calls


def test_each_block_runs_each_operation_twice(used: list[str]):
    module = fused()
    with torch.no_grad():
        module(torch.randn(1, 4, 2, 4, 6), torch.tensor([500.0]), torch.randn(1, 5, 16))
    assert sorted(used) == sorted(["adaln", "gated_residual", "rms_norm_rope"] * 2 * CONFIG.num_layers)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_checkpointing_and_compilation_change_nothing(
    checkpointed: bool, compiled: bool, timestep_shape: tuple[int, ...]
):
    wanted = forward_and_gradients(fused(), timestep_shape, torch.float32)
    module = fused()
    for block in module.blocks:
        if checkpointed:
            block.forward = recomputed(block.forward)
        if compiled:
            block.compile(backend="aot_eager", fullgraph=True)
    found = distances(forward_and_gradients(module, timestep_shape, torch.float32), wanted)
    assert max(found.values()) < 1e-6, found


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of this file: torch.compile passes over a partial of `checkpoint` and compiles nothing."""
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def test_a_frozen_network_passes_the_gradient_of_its_input():
    trained, frozen = fused(), fused().requires_grad_(False)
    gradients = []
    for module in (trained, frozen):
        latents = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
        text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))
        module(latents, torch.tensor([500.0]), text, return_dict=False)[0].sum().backward()
        gradients.append(latents.grad)
    assert torch.equal(*gradients)
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_parameters_keep_their_names():
    assert fused().state_dict().keys() == network().state_dict().keys()


def adapted(module: Any) -> Any:
    """The network with an active adapter of random weights on all that a Wan can adapt."""
    lora = adapters.Lora(rank=2, alpha=4.0, targets=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"))
    adapters.inject(module, "one", lora)
    torch.manual_seed(2)
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            for matrices in (layer.lora_A, layer.lora_B):
                nn.init.normal_(matrices.to_empty(device="cpu")["one"].weight, std=0.2)
    adapters.Switch(module).activate("one")
    return module.requires_grad_(True)


def test_fused_blocks_run_their_adapters(timestep_shape: tuple[int, ...]) -> None:
    found = forward_and_gradients(adapted(fused()), timestep_shape, torch.float32)
    wanted = forward_and_gradients(adapted(network()), timestep_shape, torch.float32)
    assert sum(".lora_" in name for name in found) == 2 * 2 * 10
    assert max(distances(found, wanted).values()) < 1e-4
    plain = forward_and_gradients(network(), timestep_shape, torch.float32)
    assert (wanted["output"] - plain["output"]).abs().max() > 0.1
