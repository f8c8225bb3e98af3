"""The Wan family: the same numbers as diffusers, from any folder, on any way in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgmd_dist.errors import UserError
from sgmd_dist.export import export_diffusers
from sgmd_dist.models.wan import Section, Wan, WanConfig, architecture, build
from sgmd_dist.parallel.load import fill, load_safetensors

KEY = "model.pretrained"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, ffn_dim=32)
SIGMA = torch.tensor([0.9873, 0.25])


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Latents of 2 x 2 x 3 = 12 tokens for two samples, and 5 text tokens each."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 2, 4, 6, generator=generator)
    return {"latents": latents, "condition": torch.randn(2, 5, 16, generator=generator)}


def section(**keys: Any) -> Section:
    return Section.model_validate({"compute_dtype": "float32", **keys})


def direct(wan: WanTransformer3DModel, batch: dict[str, Tensor], timestep: Tensor) -> Tensor:
    return wan(batch["latents"], timestep, batch["condition"], return_dict=False)[0]


def pipeline_timestep(latents: Tensor, t: Tensor) -> Tensor:
    """The timesteps `[B, L]` of diffusers' WanPipeline with `expand_timesteps`, for text to video."""
    mask = torch.ones(latents.shape)
    return (mask[0][0][:, ::2, ::2] * t).flatten().unsqueeze(0).expand(latents.shape[0], -1)


def on_meta(model: Wan) -> torch.nn.Module:
    with torch.device("meta"):
        return model.build()


def materialized(model: Wan) -> torch.nn.Module:
    """The network as the trainer gets it: built on meta, emptied into memory full of rubbish, buffers recomputed."""
    module = on_meta(model).to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.fill_(float("nan"))
    model.reset_buffers(module, torch.device("cpu"))
    return module


# Velocity


def test_the_velocity_is_what_diffusers_computes(wan, transformer_folder: Path, batch: dict[str, Tensor]):
    velocity = build(section(), str(transformer_folder), KEY).velocity(wan, sigma=SIGMA, **batch)
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, direct(wan, batch, 1000 * SIGMA))


def test_a_timestep_per_token_is_handed_over_as_diffusers_pipeline_does(
    wan, transformer_folder: Path, batch: dict[str, Tensor]
):
    model = build(section(expand_timesteps=True), str(transformer_folder), KEY)
    sigma = torch.full((2,), 0.625)
    velocity = model.velocity(wan, sigma=sigma, **batch)
    timestep = pipeline_timestep(batch["latents"], torch.tensor(625.0))
    assert timestep.shape == (2, 12)
    assert torch.equal(velocity, direct(wan, batch, timestep))


def test_a_timestep_per_token_and_one_per_sample_give_the_same_velocity(
    wan, transformer_folder: Path, batch: dict[str, Tensor]
):
    one, each = (build(section(expand_timesteps=e), str(transformer_folder), KEY) for e in (False, True))
    expected = one.velocity(wan, sigma=SIGMA, **batch)
    torch.testing.assert_close(each.velocity(wan, sigma=SIGMA, **batch), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(each.velocity(wan, sigma=SIGMA.flip(0), **batch), expected, atol=1e-3)


@pytest.mark.parametrize("expand", [False, True])
def test_bf16_compute_casts_latents_and_text_but_not_the_timestep(transformer_folder: Path, batch, expand: bool):
    model = build(section(compute_dtype="bfloat16", expand_timesteps=expand), str(transformer_folder), KEY)
    seen: dict[str, Any] = {}

    class Recorder(torch.nn.Module):
        def forward(self, **kwargs: Any) -> tuple[Tensor]:
            seen.update(kwargs)
            return (kwargs["hidden_states"],)

    velocity = model.velocity(Recorder(), sigma=SIGMA, **batch)
    assert velocity.dtype == torch.float32
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16
    assert seen["timestep"].dtype == torch.float32
    assert seen["timestep"].shape == ((2, 12) if expand else (2,))
    expected = 1000 * SIGMA  # 987.3, which bfloat16 would round to 988
    assert torch.equal(seen["timestep"].reshape(2, -1)[:, 0], expected)


def test_a_bf16_network_computes_close_to_the_float32_one(wan, transformer_folder: Path, batch: dict[str, Tensor]):
    model = build(section(compute_dtype="bfloat16"), str(transformer_folder), KEY)
    module = WanTransformer3DModel.from_pretrained(transformer_folder, torch_dtype=torch.bfloat16)
    velocity = model.velocity(module, sigma=SIGMA, **batch)
    expected = direct(wan, batch, 1000 * SIGMA)
    assert (velocity - expected).norm() / expected.norm() < 0.02


def test_gradients_reach_latents_and_parameters(transformer_folder: Path, batch: dict[str, Tensor]):
    model = build(section(), str(transformer_folder), KEY)
    module = model.build()
    batch["latents"].requires_grad_(True)
    model.velocity(module, sigma=SIGMA, **batch).square().sum().backward()
    assert batch["latents"].grad is not None and batch["latents"].grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in module.parameters())


# What the model says about itself


def test_the_model_names_its_blocks_in_order(wan, transformer_folder: Path):
    model = build(section(), str(transformer_folder), KEY)
    assert model.blocks(wan) == list(wan.blocks)
    assert len(model.blocks(wan)) == 2
    assert model.text_dim() == 16
    assert model.smallest_latents() == (4, 1, 2, 2)


@pytest.mark.parametrize(
    "channels, video, latents",
    [
        (16, (81, 480, 832), (16, 21, 60, 104)),  # Wan2.1
        (16, (1, 480, 832), (16, 1, 60, 104)),
        (48, (121, 704, 1280), (48, 31, 44, 80)),  # Wan2.2 TI2V-5B
        (3, (8, 12, 12), (3, 8, 12, 12)),  # the tiny world has no VAE
    ],
)
def test_the_latent_shape_follows_the_strides_of_the_vae(channels: int, video, latents):
    model = build(section(config=WanConfig(in_channels=channels, out_channels=channels)), None, KEY)
    assert model.latent_shape(*video) == latents


@pytest.mark.parametrize(
    "channels, patch, video, expected",
    [
        (
            16,
            (1, 2, 2),
            (80, 480, 832),
            "num_frames = 80: expected 4 n + 1 (VAE stride 4, patch size 1); nearest: 77 or 81",
        ),
        (
            16,
            (2, 2, 2),
            (81, 480, 832),
            "num_frames = 81: expected 8 n + 5 (VAE stride 4, patch size 2); nearest: 77 or 85",
        ),
        (
            16,
            (1, 2, 2),
            (81, 500, 832),
            "height = 500: expected a multiple of 16 (VAE stride 8, patch size 2); nearest: 496 or 512",
        ),
        (
            48,
            (1, 2, 2),
            (121, 704, 1296),
            "width = 1296: expected a multiple of 32 (VAE stride 16, patch size 2); nearest: 1280 or 1312",
        ),
        (
            48,
            (1, 2, 2),
            (121, 9, 1280),
            "height = 9: expected a multiple of 32 (VAE stride 16, patch size 2); nearest: 32",
        ),
        (
            3,
            (1, 2, 2),
            (8, 13, 12),
            "height = 13: expected a multiple of 2 (VAE stride 1, patch size 2); nearest: 12 or 14",
        ),
        (
            3,
            (2, 2, 2),
            (7, 12, 12),
            "num_frames = 7: expected a multiple of 2 (VAE stride 1, patch size 2); nearest: 6 or 8",
        ),
    ],
)
def test_a_video_that_makes_no_whole_latents_and_patches_is_refused(channels: int, patch, video, expected: str):
    config = WanConfig(in_channels=channels, out_channels=channels, patch_size=patch)
    with pytest.raises(UserError) as error:
        build(section(config=config), None, KEY).latent_shape(*video)
    assert str(error.value) == f"data.video.{expected}"


# Folders


def test_the_folder_of_a_pipeline_and_of_its_transformer_are_the_same_model(wan, pipeline_folder: Path):
    pipeline = build(section(), str(pipeline_folder), KEY)
    alone = build(section(), str(pipeline_folder / "transformer"), KEY)
    assert pipeline.folder == alone.folder == pipeline_folder / "transformer"
    assert pipeline.config == alone.config
    built = on_meta(pipeline).config
    assert {key: built[key] for key in wan.config if key[0] != "_"} == {
        k: v for k, v in wan.config.items() if k[0] != "_"
    }
    assert pipeline.weight_files() == {"": [pipeline_folder / "transformer" / WEIGHTS]}


@pytest.mark.parametrize("index, expected", [(True, True), (False, False), (None, False)])
def test_the_pipeline_says_whether_timesteps_are_per_token(pipeline_folder: Path, index: bool | None, expected: bool):
    path = pipeline_folder / "model_index.json"
    path.write_text(json.dumps({"_class_name": "WanPipeline"} | ({} if index is None else {"expand_timesteps": index})))
    for folder in (pipeline_folder, pipeline_folder / "transformer"):
        assert build(section(), str(folder), KEY).expand_timesteps is expected
    assert build(section(expand_timesteps=not expected), str(pipeline_folder), KEY).expand_timesteps is not expected


def test_a_sharded_folder_gives_every_file_of_its_index_once(sharded_folder: Path):
    files = build(section(), str(sharded_folder), KEY).weight_files()[""]
    assert len(files) > 2
    assert files == sorted(sharded_folder.glob("*.safetensors"))


def test_variants_beside_the_weights_are_left_alone(transformer_folder: Path):
    for variant in ("diffusion_pytorch_model.fp16.safetensors", "another.safetensors"):
        (transformer_folder / variant).write_bytes(b"not read")
    assert build(section(), str(transformer_folder), KEY).weight_files() == {"": [transformer_folder / WEIGHTS]}


def test_the_index_goes_before_a_single_file(sharded_folder: Path):
    expected = build(section(), str(sharded_folder), KEY).weight_files()
    (sharded_folder / WEIGHTS).write_bytes(b"not read")
    assert build(section(), str(sharded_folder), KEY).weight_files() == expected


def test_a_single_file_of_another_name_is_taken(transformer_folder: Path):
    renamed = (transformer_folder / WEIGHTS).rename(transformer_folder / "model.safetensors")
    assert build(section(), str(transformer_folder), KEY).weight_files() == {"": [renamed]}


@pytest.mark.parametrize("index", [{}, {"transformer_2": [None, None], "boundary_ratio": None}])
def test_a_pipeline_without_a_second_transformer_is_fine(pipeline_folder: Path, index: dict[str, Any]):
    """Wan2.2 TI2V-5B's model_index.json names the missing second transformer as [null, null]."""
    (pipeline_folder / "model_index.json").write_text(json.dumps({**index, "expand_timesteps": True}))
    assert build(section(), str(pipeline_folder), KEY).expand_timesteps


@pytest.mark.parametrize("kind", ["pipeline", "transformer", "sharded"])
def test_a_network_from_meta_equals_from_pretrained_bit_for_bit(kind: str, request, batch: dict[str, Tensor]):
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    model = build(section(), str(folder), KEY)
    module = materialized(model)
    loaded = load_safetensors(dict(module.named_parameters()), model.weight_files())
    assert loaded.num_tensors == len(list(module.parameters()))
    assert loaded.num_bytes == sum(parameter.nbytes for parameter in module.parameters())
    expected = WanTransformer3DModel.from_pretrained(model.folder, local_files_only=True)
    assert same_tensors(dict(module.named_parameters()), dict(expected.named_parameters()))
    buffers = dict(module.named_buffers())
    assert set(buffers) == {"rope.freqs_cos", "rope.freqs_sin"}
    assert same_tensors(buffers, dict(expected.named_buffers()))
    assert torch.equal(model.velocity(module, sigma=SIGMA, **batch), model.velocity(expected, sigma=SIGMA, **batch))


def same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert set(found) == set(expected)
    return all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)


def test_buffers_stay_float32_in_a_bf16_network(transformer_folder: Path):
    model = build(section(), str(transformer_folder), KEY)
    module = on_meta(model).to(torch.bfloat16).to_empty(device="cpu")
    model.reset_buffers(module, torch.device("cpu"))
    expected = WanTransformer3DModel.from_config(model.config)
    assert same_tensors(dict(module.named_buffers()), dict(expected.named_buffers()))


# Random weights


def test_random_weights_are_a_function_of_name_and_seed_alone():
    model = build(section(config=TINY), None, KEY)
    shape = (24, 24)
    first = model.initial_value("blocks.0.attn1.to_q.weight", shape, 7)
    torch.manual_seed(123)
    other = build(section(config=TINY.model_copy(update={"num_layers": 9})), None, KEY)
    assert torch.equal(other.initial_value("blocks.0.attn1.to_q.weight", shape, 7), first)
    assert not torch.equal(model.initial_value("blocks.0.attn1.to_q.weight", shape, 8), first)
    assert not torch.equal(model.initial_value("blocks.1.attn1.to_q.weight", shape, 7), first)


def test_random_weights_follow_wans_own_initialization():
    """Wan's: xavier weights, zero biases and output, unit norms, embedders of time and text at std 0.02."""
    model = build(section(config=TINY), None, KEY)
    module = materialized(model)
    parameters = dict(module.named_parameters())
    assert fill(parameters, lambda name, shape: model.initial_value(name, shape, 0)) == len(parameters)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
        elif name == "proj_out.weight":
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(expected_std(name, parameter), rel=0.25), name


def expected_std(name: str, parameter: Tensor) -> float:
    if "scale_shift_table" in name:
        return parameter.shape[-1] ** -0.5
    if "time_embedder" in name or "text_embedder" in name:
        return 0.02
    return (2 / (parameter.shape[0] + parameter[0].numel())) ** 0.5


def test_a_random_network_starts_at_velocity_zero(batch: dict[str, Tensor]):
    model = build(section(config=TINY), None, KEY)
    module = materialized(model)
    fill(dict(module.named_parameters()), lambda name, shape: model.initial_value(name, shape, 0))
    assert model.weight_files() == {}
    assert not model.velocity(module, sigma=SIGMA, **batch).any()


# Messages


def message(pretrained: Path | None, **keys: Any) -> str:
    with pytest.raises(UserError) as error:
        build(section(**keys), str(pretrained) if pretrained else None, KEY)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_neither_folder_nor_config():
    assert message(None) == f"{KEY}: neither {KEY} nor model.config is set; give a diffusers folder or a config"


DESCRIBED = TINY.model_copy(update={"freq_dim": 16, "num_layers": 2, "rope_max_seq_len": 32})


def test_a_config_beside_a_folder_is_what_the_folder_must_hold(transformer_folder: Path):
    folder, file = str(transformer_folder), transformer_folder / "config.json"
    described = section(pretrained=folder, config=DESCRIBED)
    assert build(described, folder, KEY).config == build(section(), folder, KEY).config
    other = section(pretrained=folder, config=DESCRIBED.model_copy(update={"ffn_dim": 64}))
    for make in (build, architecture):
        with pytest.raises(UserError) as error:
            make(other, folder, KEY)
        assert str(error.value) == (
            f"{KEY} = '{folder}': {file} has ffn_dim = 32, expected model.config.ffn_dim = 64; name the folder"
            " that is meant, or set model.config=null to take what it holds"
        )


def test_a_config_says_nothing_of_a_roles_own_folder(transformer_folder: Path):
    own = str(transformer_folder)
    assert (
        build(section(pretrained="elsewhere", config=TINY), own, "model.teacher.pretrained").config["num_layers"] == 2
    )
    with pytest.raises(UserError, match=r"model\.teacher\.pretrained = 'gone': no such folder"):
        architecture(section(pretrained="elsewhere", config=TINY), "gone", "model.teacher.pretrained")


def test_an_architecture_needs_no_folder_where_a_config_describes_it(transformer_folder: Path):
    described = section(pretrained="gone", config=DESCRIBED, expand_timesteps=True)
    model = architecture(described, "gone", KEY)
    there = build(section(), str(transformer_folder), KEY)
    shapes = [{name: p.shape for name, p in on_meta(m).named_parameters()} for m in (model, there)]
    assert shapes[0] == shapes[1]
    assert model.expand_timesteps and model.weight_files() == {}
    with pytest.raises(UserError, match="no such folder"):
        build(described, "gone", KEY)
    with pytest.raises(UserError, match="no such folder"):
        architecture(section(pretrained="gone"), "gone", KEY)


def test_a_missing_folder(tmp_path: Path):
    text = message(tmp_path / "gone")
    assert text.startswith(f"{KEY} = '{tmp_path / 'gone'}': no such folder (working directory {Path.cwd()})")
    assert f"set {KEY}=PATH" in text


def test_a_folder_without_a_config(tmp_path: Path):
    assert message(tmp_path) == (
        f"{KEY} = '{tmp_path}': no {tmp_path / 'config.json'}; expected a diffusers pipeline or transformer"
    )


def test_a_config_that_is_no_json(transformer_folder: Path):
    (transformer_folder / "config.json").write_text("{")
    text = message(transformer_folder)
    assert text.startswith(f"{KEY} = '{transformer_folder}': {transformer_folder / 'config.json'} is not valid JSON: ")


def test_a_folder_of_another_class(transformer_folder: Path):
    path = transformer_folder / "config.json"
    path.write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    assert message(transformer_folder) == (
        f"{KEY} = '{transformer_folder}': {path} describes FluxTransformer2DModel, expected WanTransformer3DModel"
    )


@pytest.mark.parametrize(
    "changes, found", [({"num_layers": "many"}, "num_layers = 'many'"), ({"patch_size": [1, 2]}, "patch_size.2 = ")]
)
def test_a_config_with_a_value_of_another_type(transformer_folder: Path, changes: dict[str, object], found: str):
    path = transformer_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert message(transformer_folder).startswith(f"{KEY} = '{transformer_folder}': {path}: {found}")


def test_a_folder_without_weights(transformer_folder: Path):
    (transformer_folder / WEIGHTS).unlink()
    assert message(transformer_folder) == (
        f"{KEY} = '{transformer_folder}': {transformer_folder} holds no *.safetensors weights; download them too"
    )


@pytest.mark.parametrize(
    "changes, found",
    [
        (
            {"in_channels": 8},
            "in_channels = 8, out_channels = 4: expected equal numbers, or in_channels = 12 for image to",
        ),
        ({"image_dim": 10}, "image_dim = 10, added_kv_proj_dim = None, in_channels = 4: expected both or none"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len = 514: a model of first and last frames"),
    ],
)
def test_a_model_that_sees_something_else(transformer_folder: Path, changes: dict[str, int], found: str):
    path = transformer_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    text = message(transformer_folder)
    assert text.startswith(f"{KEY} = '{transformer_folder}': {path} has {found}")
    assert text.endswith("supported are Wan2.1 T2V and I2V, Wan2.2 TI2V-5B and Wan2.2 T2V-A14B and I2V-A14B")


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize(
    "content, problem",
    [
        ("{", "is not valid JSON: "),
        ("[1, 2]", "holds [1, 2], expected a JSON object"),
        ("null", "holds null, expected"),
    ],
)
def test_a_broken_description(pipeline_folder: Path, name: str, content: str, problem: str):
    path = pipeline_folder / name
    path.write_text(content)
    assert message(pipeline_folder).startswith(f"{KEY} = '{pipeline_folder}': {path} {problem}")


def test_a_pipeline_with_a_word_for_a_switch(pipeline_folder: Path):
    path = pipeline_folder / "model_index.json"
    path.write_text(json.dumps({"expand_timesteps": "yes"}))
    assert message(pipeline_folder) == (
        f"{KEY} = '{pipeline_folder}': {path} has expand_timesteps = \"yes\", expected true or false"
    )


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_a_weight_index_without_a_map(sharded_folder: Path, content: str):
    index = sharded_folder / f"{WEIGHTS}.index.json"
    index.write_text(content)
    assert message(sharded_folder) == (
        f"{KEY} = '{sharded_folder}': {index} has no weight_map from tensors to files; download it again"
    )


def test_a_weight_file_that_the_index_names_but_is_missing(sharded_folder: Path):
    victim = sorted(sharded_folder.glob("*.safetensors"))[1]
    victim.unlink()
    assert message(sharded_folder) == (
        f"{KEY} = '{sharded_folder}': {sharded_folder / f'{WEIGHTS}.index.json'} names files that are not there:"
        f" {victim.name}; download them too"
    )


def test_several_weight_files_of_other_names(transformer_folder: Path):
    (transformer_folder / WEIGHTS).rename(transformer_folder / "b.safetensors")
    (transformer_folder / "a.safetensors").write_bytes(b"")
    assert message(transformer_folder) == (
        f"{KEY} = '{transformer_folder}': {transformer_folder} holds a.safetensors, b.safetensors, and neither"
        f" {WEIGHTS} nor {WEIGHTS}.index.json; add the one that is meant"
    )


def loading_message(folder: Path) -> str:
    """The error of loading `folder`, after making sure that it loaded nothing."""
    model = build(section(), str(folder), KEY)
    module = materialized(model)
    with pytest.raises(UserError) as error:
        load_safetensors(dict(module.named_parameters()), model.weight_files())
    assert all(parameter.isnan().all() for parameter in module.parameters())
    return str(error.value)


def test_weights_that_do_not_fit_are_named_by_kind(transformer_folder: Path):
    tensors = load_file(transformer_folder / WEIGHTS)
    del tensors["proj_out.bias"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["patch_embedding.bias"] = torch.zeros(3)
    save_file(tensors, transformer_folder / WEIGHTS)
    assert loading_message(transformer_folder) == (
        f"{transformer_folder}: the weights do not fit the network: 1 missing (proj_out.bias); 1 unexpected"
        " (extra.weight); 1 of another shape (patch_embedding.bias (3,), expected (24,)); check its config.json"
    )


def test_a_long_list_of_keys_is_cut(transformer_folder: Path):
    save_file({"a": torch.zeros(1)}, transformer_folder / WEIGHTS)
    text = loading_message(transformer_folder)
    assert " and " in text and " more)" in text
    assert len(text) < 600


def test_a_damaged_weight_file_is_named(sharded_folder: Path):
    victim = sorted(sharded_folder.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    text = loading_message(sharded_folder)
    assert text.startswith(f"{victim}: cannot be read as safetensors: ")
    assert text.endswith("; download the file again")


# Export


def test_an_export_loads_in_diffusers_and_comes_back_bit_for_bit(
    wan, transformer_folder: Path, tmp_path: Path, batch: dict[str, Tensor]
):
    model = build(section(), str(transformer_folder), KEY)
    weights = {name: tensor + 1e-3 for name, tensor in wan.state_dict().items()}
    out = tmp_path / "out" / "export"
    out.parent.mkdir()
    assert export_diffusers(weights, model, out) == len(weights)
    exported = WanTransformer3DModel.from_pretrained(out, local_files_only=True)
    assert same_tensors(exported.state_dict(), weights)
    again = build(section(), str(out), KEY)
    module = materialized(again)
    load_safetensors(dict(module.named_parameters()), again.weight_files())
    assert same_tensors(module.state_dict(), weights)
    assert torch.equal(again.velocity(module, sigma=SIGMA, **batch), direct(exported, batch, 1000 * SIGMA))


def test_an_export_of_a_network_from_a_config_can_be_trained_on(tmp_path: Path):
    model = build(section(config=TINY), None, KEY)
    module = model.build()
    export_diffusers(module.state_dict(), model, tmp_path / "export")
    again = build(section(), str(tmp_path / "export"), KEY)
    assert {k: again.config[k] for k in model.config} == model.config


def test_an_export_overwrites_nothing(wan, transformer_folder: Path):
    model = build(section(), str(transformer_folder), KEY)
    with pytest.raises(UserError, match="exists already; choose another folder or remove it"):
        export_diffusers(wan.state_dict(), model, transformer_folder)


def test_an_export_that_reloads_to_other_tensors_is_refused(wan, transformer_folder: Path, tmp_path: Path, monkeypatch):
    model = build(section(), str(transformer_folder), KEY)
    weights = wan.state_dict()
    other = {**weights, "proj_out.bias": weights["proj_out.bias"] + 1}
    monkeypatch.setattr(model, "read_export", lambda folder: other)
    with pytest.raises(UserError, match=r"reloading gives other tensors than were written: proj_out\.bias"):
        export_diffusers(weights, model, tmp_path / "export")
    assert not (tmp_path / "export").exists()
