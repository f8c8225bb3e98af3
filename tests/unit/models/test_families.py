"""The families beside Wan: the numbers of their pipelines, from a folder, and on any way in and out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, LTXConditionPipeline, LTXPipeline
from tiny_families import FAMILIES, LATENTS, TEXT_WIDTH, Family, mask_of
from torch import Tensor, nn

from sgmd_dist import adapters, heads, registry
from sgmd_dist.adapters import Lora
from sgmd_dist.assemble import load_network, plan_networks
from sgmd_dist.errors import UserError
from sgmd_dist.export import export_adapter, export_diffusers
from sgmd_dist.objectives.dmd2 import GanSection
from sgmd_dist.parallel.load import fill, load_safetensors
from sgmd_dist.parallel.sequence import SequenceAxis
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.roles import WARM_UP_TOKENS

RECIPE = Path(__file__).resolve().parents[3] / "recipes/tiny_sgmd.yaml"
KEY = "model.pretrained"
SIGMA = torch.tensor([0.9873, 0.25])
LENGTHS = [5, 2]


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def folder(family: Family, tmp_path: Path) -> Path:
    return family.save(tmp_path / "pipeline")


@pytest.fixture
def batch(family: Family) -> dict[str, Tensor]:
    """Two samples; the prompt of the second is filled up with zeros, as a `Batch` fills it."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 5, TEXT_WIDTH, generator=generator)
    text[1, 2:] = 0
    return {"latents": torch.randn(2, *LATENTS, generator=generator), "condition": text}


def build(family: Family, place: Path | None, **keys: Any) -> Any:
    module = registry.load(registry.MODELS, family.name)
    section = module.Section.model_validate({"compute_dtype": "float32", "text_tokens": 5, **keys})
    return module.build(section, None if place is None else str(place), KEY)


def loaded(model: Any) -> nn.Module:
    """The network as the trainer gets it: built on meta, emptied into memory full of rubbish, filled."""
    with torch.device("meta"):
        module: nn.Module = model.build()
    model.attach(module, SequenceAxis(None))
    module.to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.fill_(float("nan"))
    model.reset_buffers(module, torch.device("cpu"))
    load_safetensors(dict(module.named_parameters()), model.weight_files())
    return module


def test_the_velocity_is_what_the_pipeline_computes(family: Family, folder: Path, batch: dict[str, Tensor]) -> None:
    """For several samples at their own levels; the padding of a text changes nothing, or is what the pipeline has."""
    model = build(family, folder)
    velocity = model.velocity(loaded(model), sigma=SIGMA, **batch)
    expected = family.velocity(family.random(), batch["latents"], SIGMA, batch["condition"], LENGTHS)
    assert velocity.dtype == torch.float32 and velocity.shape == batch["latents"].shape
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=2e-5)
    assert expected.std() > 0.05


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({"use_rotary_positional_embeddings": False}, LATENTS),
        ({"use_rotary_positional_embeddings": False, "sample_width": 6}, LATENTS),
        ({"patch_size_t": 2}, (3, 4, 8, 6)),
    ],
    ids=["2B", "2B of another size", "1.5"],
)
def test_other_versions_of_cogvideox(changes: dict[str, Any], shape: tuple[int, ...], tmp_path: Path) -> None:
    family = FAMILIES["cogvideox"]
    version = replace(family, config={**family.config, **changes})
    model = build(version, version.save(tmp_path))
    latents, text = torch.randn(2, *shape), torch.randn(2, 5, TEXT_WIDTH)
    velocity = model.velocity(loaded(model), latents, SIGMA, text)
    expected = version.velocity(version.random(), latents, SIGMA, text, LENGTHS)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=2e-5)


def test_cogvideox_2b_takes_the_short_text_of_a_warm_up(tmp_path: Path) -> None:
    family = FAMILIES["cogvideox"]
    version = replace(family, config={**family.config, "use_rotary_positional_embeddings": False})
    model = build(version, version.save(tmp_path))
    module, latents, short = loaded(model), torch.randn(2, *LATENTS), torch.randn(2, WARM_UP_TOKENS, TEXT_WIDTH)
    whole = torch.cat([short, torch.zeros(2, 5 - WARM_UP_TOKENS, TEXT_WIDTH)], 1)
    assert torch.equal(model.velocity(module, latents, SIGMA, short), model.velocity(module, latents, SIGMA, whole))


def test_later_versions_of_ltx_count_the_first_frame_as_one(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    """As the pipeline that the folder names, also for a transformer that was trained from it."""
    family = FAMILIES["ltx"]
    folder = family.save(tmp_path / "pipeline")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LTXConditionPipeline"}))
    trained = family.save(tmp_path / "run") / "transformer"
    latents, text = batch["latents"], batch["condition"]
    frames, height, width = latents.shape[2:]
    ids = LTXConditionPipeline._prepare_video_ids(2, frames, height, width)
    places = LTXConditionPipeline._scale_video_ids(ids, 32, 8).float()
    places[:, 0] = places[:, 0] * (1.0 / 16)
    expected = family.random()(
        hidden_states=LTXPipeline._pack_latents(latents),
        encoder_hidden_states=text,
        timestep=1000 * SIGMA,
        encoder_attention_mask=mask_of(text, LENGTHS),
        video_coords=places,
        return_dict=False,
    )[0]
    expected = LTXPipeline._unpack_latents(expected, frames, height, width)
    for place in (folder, folder / "transformer", trained):
        model = build(family, place, frame_rate=16.0, pretrained=str(folder))
        torch.testing.assert_close(model.velocity(loaded(model), sigma=SIGMA, **batch), expected, rtol=1e-4, atol=2e-5)
        assert model.text_encoding.max_tokens == 256 and model.scheduler_call is None
    earlier = build(family, folder, frame_rate=16.0, causal_positions=False)
    assert (earlier.velocity(loaded(earlier), sigma=SIGMA, **batch) - expected).abs().max() > 1e-3


def test_a_scheduler_without_all_keys_has_its_own_defaults(tmp_path: Path) -> None:
    family = FAMILIES["cogvideox"]
    folder = family.save(tmp_path)
    named = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(named))
    products = CogVideoXDDIMScheduler(prediction_type="v_prediction").alphas_cumprod.double()
    signal, noise = products.sqrt(), (1 - products).sqrt()
    levels = torch.tensor(build(family, folder).levels, dtype=torch.float64)
    torch.testing.assert_close(levels, noise / (signal + noise))


def test_cogvideox_wants_its_diffusion_and_its_length_of_text(tmp_path: Path) -> None:
    family = FAMILIES["cogvideox"]
    folder = family.save(tmp_path)
    recipe = load_recipe(RECIPE, [f"model={{family: cogvideox, pretrained: {folder}, text_tokens: 8}}"])
    with pytest.raises(UserError, match=r"model.text_tokens = 8: expected 5: the padding of prompts is a part"):
        plan_networks(recipe, {"generator": True})
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
    with pytest.raises(UserError, match=r"prediction_type = 'epsilon': .*set model.noise_schedule"):
        build(family, folder)
    scheduler.unlink()
    with pytest.raises(UserError, match=r"not found; give a pipeline's folder .* or set model.noise_schedule"):
        build(family, folder)
    assert build(family, folder, noise_schedule={"snr_shift_scale": 3.0}).levels[-1] == 1


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if not family.splits_sequences))
def test_ranks_that_share_sequences_are_refused(name: str, axis: str, tmp_path: Path) -> None:
    model = f"model={{family: {name}, pretrained: {FAMILIES[name].save(tmp_path)}, text_tokens: 5}}"
    recipe = load_recipe(RECIPE, [model, f"parallel.{axis}=2"])
    with pytest.raises(UserError, match=rf"parallel.{axis} = 2: model.family = {name} has no sequence parallelism"):
        plan_networks(recipe, {"generator": True})


def test_a_bf16_network_computes_close_to_the_float32_one(
    family: Family, folder: Path, batch: dict[str, Tensor]
) -> None:
    full, half = (build(family, folder, compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
    expected = full.velocity(loaded(full), sigma=SIGMA, **batch)
    velocity = half.velocity(nn.Module.to(loaded(half), torch.bfloat16), sigma=SIGMA, **batch)
    assert velocity.dtype == torch.float32
    assert (velocity - expected).norm() / expected.norm() < 0.03


def test_an_unsharded_network_computes_the_same(family: Family, folder: Path, batch: dict[str, Tensor]) -> None:
    """As samples and evaluations run it, without a sequence axis."""
    model = build(family, folder)
    network = load_network(model, None, torch.device("cpu"))
    velocity = network(batch["latents"], SIGMA, batch["condition"], 0.9)
    expected = model.velocity(loaded(model), sigma=SIGMA, **batch)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=2e-5)


def test_a_head_reads_the_tokens_of_the_video(family: Family, folder: Path, batch: dict[str, Tensor]) -> None:
    """Also where a block gives out those of the text too."""
    model = build(family, folder)
    module = loaded(model)
    heads.inject(module, model, GanSection(width=8))
    with heads.asked(heads.heads_of(module), LATENTS) as logits:
        velocity = model.velocity(module, sigma=SIGMA, **batch)
    assert logits[0].shape == (2,) and logits[0].isfinite().all()
    torch.testing.assert_close(velocity, model.velocity(loaded(model), sigma=SIGMA, **batch))


def test_gradients_reach_latents_and_parameters(family: Family, folder: Path, batch: dict[str, Tensor]) -> None:
    model = build(family, folder)
    module = loaded(model)
    batch["latents"].requires_grad_(True)
    model.velocity(module, sigma=SIGMA, **batch).square().sum().backward()
    assert batch["latents"].grad is not None and batch["latents"].grad.abs().sum() > 0
    without = {name for name, p in module.named_parameters() if p.grad is None}
    assert all(name.startswith(family.unused) for name in without), without


def test_the_model_describes_itself(family: Family, folder: Path) -> None:
    model = build(family, folder)
    with torch.device("meta"):
        module = model.build()
    assert model.blocks(module) == list(module.transformer_blocks)
    assert model.attention_shape().num_blocks == len(model.blocks(module)) == 2
    assert model.text_dim() == TEXT_WIDTH
    frames, height, width = (a // b for a, b in zip(LATENTS[1:], model.smallest_latents()[1:], strict=True))
    assert model.num_tokens(LATENTS) == frames * height * width


@pytest.mark.parametrize(
    "name, video, latents",
    [
        ("ltx", (161, 512, 704), (128, 21, 16, 22)),
        ("cogvideox", (49, 480, 720), (16, 13, 60, 90)),
        ("hunyuan_video_15", (121, 480, 832), (32, 31, 30, 52)),
    ],
)
def test_the_latent_shape_follows_the_strides_of_the_vae(name: str, video: tuple[int, int, int], latents) -> None:
    tokens = 226 if name == "cogvideox" else 5
    assert build(FAMILIES[name], None, config={}, text_tokens=tokens).latent_shape(*video) == latents


def test_random_weights_are_a_function_of_name_and_seed_alone(family: Family) -> None:
    model = build(family, None, config=family.config)
    with torch.device("meta"):
        module = model.build()
    first, second = ({n: model.initial_value(n, p.shape, 0) for n, p in module.named_parameters()} for _ in range(2))
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
    module.to_empty(device="cpu")
    model.reset_buffers(module, torch.device("cpu"))
    fill(dict(module.named_parameters()), lambda name, _: first[name])
    model.attach(module, SequenceAxis(None))
    velocity = model.velocity(module, torch.randn(1, *LATENTS), torch.tensor([0.5]), torch.randn(1, 5, TEXT_WIDTH))
    assert not velocity.any(), "the last layer begins at zero"


def test_an_export_comes_back_bit_for_bit_and_loads_in_diffusers(family: Family, folder: Path, tmp_path: Path) -> None:
    model, weights = build(family, folder), family.random().state_dict()
    assert export_diffusers(weights, model, tmp_path / "out") == len(weights)
    again = family.network.from_pretrained(tmp_path / "out", local_files_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    assert build(family, tmp_path / "out", **family.alone).weight_files()


def test_an_adapter_reaches_every_target_and_comes_back(family: Family, folder: Path, tmp_path: Path) -> None:
    model = build(family, folder)
    with torch.device("meta"):
        module = model.build()
    lora = Lora(rank=2, alpha=2.0, targets=model.lora_targets())
    adapters.inject(module, "only", lora)
    shapes = {name: p.shape for name, p in adapters.adapter_parameters(module, "only").items()}
    for target in model.lora_targets():
        assert any(f".{target}." in name and name.startswith("transformer_blocks.1.") for name in shapes), target
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    assert export_adapter(weights, lora, model, tmp_path / "lora") == len(weights)


@pytest.mark.parametrize(
    "mistake, expected",
    [
        (lambda folder: folder / "nowhere", "no such folder"),
        (lambda folder: _without(folder, "config.json"), "expected a diffusers pipeline or transformer"),
        (lambda folder: _without(folder, "diffusion_pytorch_model.safetensors"), "holds no *.safetensors weights"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(family: Family, folder: Path, mistake: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected.replace("*", r"\*")) as error:
        build(family, mistake(folder))
    assert KEY in str(error.value)


def _without(folder: Path, name: str) -> Path:
    (folder / "transformer" / name).unlink()
    return folder


def test_another_familys_folder_is_refused(family: Family, transformer_folder: Path) -> None:
    with pytest.raises(UserError, match=f"describes WanTransformer3DModel, expected {family.network.__name__}"):
        build(family, transformer_folder)


def test_a_folder_of_another_size_than_the_recipes_is_refused(family: Family, folder: Path) -> None:
    config = {**family.config, "num_layers": 7}
    with pytest.raises(UserError, match=r"has num_layers = 2, expected model.config.num_layers = 7"):
        build(family, folder, config=config, pretrained=str(folder))
