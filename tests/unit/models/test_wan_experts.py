"""Two transformers by noise level as one model: diffusers' rule, folders and numbers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sgmd_dist import flow
from sgmd_dist.errors import UserError
from sgmd_dist.export import export_diffusers
from sgmd_dist.models._wan_experts import WanExperts
from sgmd_dist.models.wan import Section, Wan, WanConfig, architecture, build
from sgmd_dist.parallel.load import fill, load_safetensors
from sgmd_dist.rollout import guided, sample

KEY = "model.pretrained"
TINY = WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, ffn_dim=32)
BOUNDARY = 0.875


def section(**keys: Any) -> Section:
    return Section.model_validate({"compute_dtype": "float32", **keys})


def pair_of(folder: Path, **keys: Any) -> WanExperts:
    model = build(section(**keys), str(folder), KEY)
    assert isinstance(model, WanExperts)
    return model


def materialized(model: WanExperts) -> nn.Module:
    """The pair with its weights, as the trainer gets it, in memory that was full of rubbish."""
    with torch.device("meta"):
        module = model.build()
    module.to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.fill_(float("nan"))
    model.reset_buffers(module, torch.device("cpu"))
    load_safetensors(dict(module.named_parameters()), model.weight_files())
    return module


@pytest.fixture
def pair(pair_folder: Path) -> tuple[WanExperts, nn.Module]:
    model = pair_of(pair_folder)
    return model, materialized(model).requires_grad_(False)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 2, 4, 6, generator=generator)
    return {"latents": latents, "condition": torch.randn(2, 5, 16, generator=generator)}


def direct(wan: WanTransformer3DModel, batch: dict[str, Tensor], sigma: Tensor) -> Tensor:
    return wan(batch["latents"], 1000 * sigma, batch["condition"], return_dict=False)[0]


# Routing


@pytest.mark.parametrize(
    "sigma, expert",
    [(1.0, "high"), (0.9375, "high"), (BOUNDARY, "high"), (0.87499994, "low"), (5 / 6, "low"), (0.0, "low")],
)
def test_a_batch_is_run_by_the_expert_of_its_level(pair, experts, batch: dict[str, Tensor], sigma: float, expert: str):
    model, module = pair
    levels = torch.full((2,), sigma)
    assert torch.equal(
        model.velocity(module, sigma=levels, level=sigma, **batch), direct(experts[expert], batch, levels)
    )


@pytest.mark.parametrize("level, sigma, expert", [(BOUNDARY, [0.9, 0.98], "high"), (0.0, [0.02, 0.8], "low")])
def test_levels_on_one_side_of_the_boundary_may_differ(pair, experts, batch, level: float, sigma, expert: str):
    model, module = pair
    levels = torch.tensor(sigma)
    assert torch.equal(
        model.velocity(module, sigma=levels, level=level, **batch), direct(experts[expert], batch, levels)
    )


@pytest.mark.parametrize("level", [0.9, 0.5])
def test_a_batch_on_both_sides_of_the_boundary_is_a_bug(pair, batch: dict[str, Tensor], level: float):
    model, module = pair
    with pytest.raises(RuntimeError, match=r"noise levels of a batch lie on both sides of 0\.875"):
        model.velocity(module, sigma=torch.tensor([0.9, 0.5]), level=level, **batch)


@pytest.mark.parametrize("boundary", [BOUNDARY, 0.9, 0.417, 0.7])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_the_rule_at_every_level_is_that_of_diffusers_pipeline(boundary: float, shift: float):
    """The pipeline compares its scheduler's timesteps, 1000 sigma in float32, with 1000 boundary_ratio."""
    chains = [sigma for n in (4, 8, 20, 40, 50) for sigma in flow.sampling_sigmas(n, shift)]
    grid = [flow.renoise_level(step, shift, 0.0, 1.0) for step in flow.ALL_STEPS]
    for level in [*chains, *grid, boundary]:
        timestep = torch.tensor(level, dtype=torch.float32) * 1000
        assert flow.reaches(level, boundary) == bool(timestep >= boundary * 1000), level


def test_a_guided_chain_is_that_of_diffusers_pipeline(pair, experts, batch: dict[str, Tensor]):
    """8 Euler steps over the boundary, from the same noise."""
    sigmas = flow.sampling_sigmas(8, 5.0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda num_inference_steps, device: set_timesteps(sigmas=sigmas[:-1], device=device)
    pipeline = WanPipeline(
        None, None, None, scheduler, transformer=experts["high"], transformer_2=experts["low"], boundary_ratio=BOUNDARY
    )
    pipeline.set_progress_bar_config(disable=True)
    negative = torch.zeros(1, 5, 16)
    expected = pipeline(
        prompt_embeds=batch["condition"], negative_prompt_embeds=negative.expand(2, -1, -1), guidance_scale=3.0,
        latents=batch["latents"], num_inference_steps=8, num_frames=5, height=32, width=48, output_type="latent",
    ).frames  # fmt: skip
    model, module = pair
    velocity = guided(partial(model.velocity, module), batch["condition"], negative, 3.0)
    torch.testing.assert_close(sample(velocity, batch["latents"], 8, 5.0), expected, rtol=1e-4, atol=1e-5)


def test_routing_needs_no_numbers_from_the_device(pair_folder: Path):
    """As in a dry run, whose tensors hold none."""
    model = pair_of(pair_folder)
    ran: list[str] = []
    with FakeTensorMode():
        module = model.build()
        for name in ("high", "low"):
            getattr(module, name).register_forward_hook(lambda *_, name=name: ran.append(name))
        x, text = torch.zeros(1, *model.smallest_latents()), torch.zeros(1, 1, model.text_dim())
        for level in (0.9, 0.8):
            model.velocity(module, x, torch.full((1,), level), text, level)
    assert ran == ["high", "low"]


# The pair as one network


def test_both_experts_are_loaded_bit_for_bit(pair, experts):
    _, module = pair
    expected = {f"{which}.{name}": t for which in ("high", "low") for name, t in experts[which].state_dict().items()}
    assert module.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())
    for which in ("high", "low"):
        buffers = dict(getattr(module, which).named_buffers())
        assert all(torch.equal(buffers[name], buffer) for name, buffer in experts[which].named_buffers())


def test_networks_go_up_in_noise_level_and_have_blocks_of_their_own(pair):
    model, module = pair
    assert model.boundaries == (BOUNDARY,)
    assert model.networks(module) == [module.low, module.high]
    assert [model.blocks(network) for network in model.networks(module)] == [
        list(module.low.blocks), list(module.high.blocks)
    ]  # fmt: skip


def test_what_is_said_of_shapes_is_said_of_either_expert(pair_folder: Path):
    model, expert = pair_of(pair_folder), build(section(config=TINY), None, KEY)
    assert isinstance(expert, Wan)
    assert model.latent_shape(5, 8, 8) == expert.latent_shape(5, 8, 8)
    assert (model.text_dim(), model.smallest_latents()) == (16, (4, 1, 2, 2))
    assert (model.attention_shape().num_blocks, model.num_tokens((4, 2, 4, 6))) == (2, 12)


def test_random_experts_differ_and_are_a_function_of_name_and_seed():
    model = build(section(config=TINY.model_copy(update={"num_layers": 1}), boundary_ratio=0.5), None, KEY)
    assert isinstance(model, WanExperts) and model.boundaries == (0.5,)
    networks = []
    for _ in range(2):
        module = model.build()
        fill(dict(module.named_parameters()), lambda name, shape: model.initial_value(name, shape, 7))
        networks.append(module)
    first, again = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(first[f"high.{name}"], first[f"low.{name}"])
    assert not first["high.proj_out.weight"].any() and not first["low.proj_out.weight"].any()


def test_a_pair_can_be_planned_without_its_folder():
    described = section(pretrained="gone", config=TINY, boundary_ratio=BOUNDARY)
    model = architecture(described, "gone", KEY)
    assert isinstance(model, WanExperts) and model.weight_files() == {} and model.boundaries == (BOUNDARY,)


# Folders


@pytest.mark.parametrize("part", ["", "transformer", "transformer_2"])
def test_the_folder_of_either_transformer_stands_for_the_pipeline(pair_folder: Path, part: str):
    files = pair_of(pair_folder / part).weight_files()
    assert files["high."] == [pair_folder / "transformer" / "diffusion_pytorch_model.safetensors"]
    assert len(files["low."]) > 2 and {path.parent for path in files["low."]} == {pair_folder / "transformer_2"}


def test_the_recipe_may_move_the_boundary(pair_folder: Path):
    assert pair_of(pair_folder, boundary_ratio=0.9).boundaries == (0.9,)


def message(pretrained: Path, **keys: Any) -> str:
    with pytest.raises(UserError) as error:
        build(section(**keys), str(pretrained), KEY)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{KEY} = '{pretrained}': ")


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
def test_a_missing_expert(pair_folder: Path, part: str):
    (pair_folder / part).rename(pair_folder.parent / "elsewhere")
    assert message(pair_folder if part == "transformer_2" else pair_folder / "transformer_2") == (
        f"no {pair_folder / part}: with boundary_ratio = 0.875 a pipeline has two transformers, transformer and"
        " transformer_2; download the missing one"
    )


def test_a_boundary_for_a_pipeline_of_one(pipeline_folder: Path):
    assert message(pipeline_folder, boundary_ratio=0.9) == (
        f"no {pipeline_folder / 'transformer_2'}: with boundary_ratio = 0.9 a pipeline has two transformers,"
        " transformer and transformer_2; set model.boundary_ratio=null"
    )


def test_an_expert_without_weights(pair_folder: Path):
    for path in (pair_folder / "transformer_2").glob("*.safetensors*"):
        path.unlink()
    assert message(pair_folder) == f"{pair_folder / 'transformer_2'} holds no *.safetensors weights; download them too"


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, True, "0.9"])
def test_a_boundary_that_is_none(pair_folder: Path, value: object):
    rewrite(pair_folder, boundary_ratio=value)
    path = pair_folder / "model_index.json"
    assert message(pair_folder) == f"{path} has boundary_ratio = {json.dumps(value)}, expected a number between 0 and 1"


def test_two_transformers_without_a_boundary(pair_folder: Path):
    rewrite(pair_folder, boundary_ratio=None)
    assert message(pair_folder) == (
        f"{pair_folder / 'model_index.json'} names transformer_2 and no boundary_ratio; set model.boundary_ratio to the"
        " noise level at which the two take turns, 0.875 for Wan2.2-T2V-A14B"
    )
    assert pair_of(pair_folder, boundary_ratio=0.875).boundaries == (0.875,)


def test_experts_of_different_architectures(pair_folder: Path):
    path = pair_folder / "transformer_2/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 64, "num_layers": 3}))
    assert message(pair_folder) == (
        "transformer and transformer_2 have ffn_dim = 32 and 64, num_layers = 2 and 3: expected two networks of one"
        " architecture"
    )


# Export


def test_an_export_holds_both_experts_and_is_a_model_again(pair, tmp_path: Path):
    model, module = pair
    weights = {name: tensor + 1e-3 for name, tensor in module.state_dict().items()}
    out = tmp_path / "export"
    assert export_diffusers(weights, model, out) == len(weights)
    for which, name in (("high", "transformer"), ("low", "transformer_2")):
        loaded = WanTransformer3DModel.from_pretrained(out / name, local_files_only=True).state_dict()
        assert all(torch.equal(tensor, weights[f"{which}.{key}"]) for key, tensor in loaded.items())
    again = pair_of(out)
    assert again.boundaries == (BOUNDARY,) and again.config == {**model.config, **again.config}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in materialized(again).state_dict().items())
