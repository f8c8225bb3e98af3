"""Image to video: the network sees what diffusers' pipeline shows it, the image stays under guidance, and errors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgmd_dist.assemble import load_network
from sgmd_dist.conditions import TextAndImage
from sgmd_dist.errors import UserError
from sgmd_dist.export import export_diffusers
from sgmd_dist.models._wan_experts import FOLDERS, WanExperts
from sgmd_dist.models.base import ImageInput
from sgmd_dist.models.wan import Section, Wan, build
from sgmd_dist.parallel.sequence import SequenceAxis
from sgmd_dist.prompts import Prompt, check_prompts
from sgmd_dist.rollout import guided

KEY = "model.pretrained"
SHAPE = (4, 3, 4, 6)  # latents
NUM_EMBEDS, EMBED_DIM = 5, 10
CHANNELS = {"in_channels": 12}  # 4 of the latents, 4 of the mask, 4 of the image
KINDS: dict[str, dict[str, int]] = {
    "2.1": {**CHANNELS, "image_dim": EMBED_DIM, "added_kv_proj_dim": 24},
    "2.2": CHANNELS,
}
CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
SIGMA = torch.tensor([0.3, 0.9])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def module(kind: str) -> WanTransformer3DModel:
    torch.manual_seed(0)
    made = WanTransformer3DModel(**CONFIG, **KINDS[kind]).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # also those that diffusers sets to one or zero
    return made


@pytest.fixture
def folder(module: WanTransformer3DModel, tmp_path: Path) -> Path:
    module.save_pretrained(tmp_path / "i2v")
    return tmp_path / "i2v"


def model_in(folder: Path, **keys: Any) -> Wan:
    model = build(Section.model_validate({"family": "wan", "compute_dtype": "float32", **keys}), str(folder), KEY)
    assert isinstance(model, Wan)
    return model


def condition(kind: str, seed: int = 0) -> TextAndImage:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return TextAndImage(draw(2, 7, 16), draw(2, *SHAPE), draw(2, NUM_EMBEDS, EMBED_DIM) if kind == "2.1" else None)


def direct(module: nn.Module, x: Tensor, sigma: Tensor, given: TextAndImage) -> Tensor:
    """What diffusers' pipeline hands to its transformer; the mask is held against the pipeline's own where shards are
    prepared."""
    mask = torch.zeros(2, 4, *SHAPE[1:])
    mask[:, :, 0] = 1
    channels = torch.cat([x, mask, given.latents], 1)
    text = given.text
    if given.embeds is not None:
        text = torch.cat([text, text.new_zeros(len(x), 512 - text.shape[1], text.shape[2])], 1)
    return module(channels, 1000 * sigma, text, given.embeds, return_dict=False)[0]


def test_the_velocity_is_what_diffusers_computes(kind: str, module: WanTransformer3DModel, folder: Path) -> None:
    x, given = torch.randn(2, *SHAPE), condition(kind)
    expected = direct(module, x, SIGMA, given)
    model = model_in(folder)
    assert torch.equal(model.velocity(module, x, SIGMA, given), expected)
    other = TextAndImage(given.text, given.latents.flip(0), given.embeds)
    assert not torch.allclose(model.velocity(module, x, SIGMA, other), expected, atol=1e-3), "the image counts"
    model.attach(module, SequenceAxis(None))
    torch.testing.assert_close(model.velocity(module, x, SIGMA, given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["batched", "separate"])
def test_guidance_has_the_negative_prompt_and_the_same_image(
    kind: str, module: WanTransformer3DModel, folder: Path, mode: Any
) -> None:
    x, given, negative = torch.randn(2, *SHAPE), condition(kind), torch.randn(1, 7, 16)
    velocity = guided(partial(model_in(folder).velocity, module), given, negative, 3.0, mode)(x, SIGMA, 0.0)
    yes = direct(module, x, SIGMA, given)
    no = direct(module, x, SIGMA, TextAndImage(negative.expand(2, -1, -1), given.latents, given.embeds))
    torch.testing.assert_close(velocity, no + 3.0 * (yes - no), rtol=1e-4, atol=1e-4)


def test_latents_are_those_of_the_noise(kind: str, folder: Path) -> None:
    model = model_in(folder)
    assert model.smallest_latents() == (4, 1, 2, 2) and model.latent_shape(3, 4, 6) == SHAPE
    expected = ImageInput(257, EMBED_DIM, ("norm_added_q",)) if kind == "2.1" else ImageInput()
    assert model.image_input == expected
    assert ("add_k_proj" in model.lora_targets()) == (kind == "2.1")


def test_published_files_hold_a_norm_of_queries_that_are_not_there(
    module: WanTransformer3DModel, folder: Path, kind: str
) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, path)
    if kind == "2.2":
        with pytest.raises(UserError, match=r"1 unexpected \(blocks\.0\.attn2\.norm_added_q\.weight\)"):
            load_network(model_in(folder), None, torch.device("cpu"))
        return
    x, given = torch.randn(2, *SHAPE), condition(kind)
    network = load_network(model_in(folder), None, torch.device("cpu"))
    assert torch.equal(network(x, SIGMA, given, 0.0), direct(module, x, SIGMA, given))


def test_without_an_image_there_is_a_message(kind: str, module: WanTransformer3DModel, folder: Path) -> None:
    x, given, model = torch.zeros(2, *SHAPE), condition(kind), model_in(folder)
    with pytest.raises(UserError, match="image-to-video model, and there is no image to begin with"):
        model.velocity(module, x, SIGMA, given.text)
    if kind == "2.1":
        with pytest.raises(UserError, match="there is no embeddings of the image"):
            model.velocity(module, x, SIGMA, TextAndImage(given.text, given.latents))


def test_prompts_without_images_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"samples\.prompts: this is an image-to-video model, and 'a ball' has no"):
        check_prompts([Prompt("a ball")], model_in(folder), "samples.prompts")


def test_a_text_of_another_length_than_diffusers_splits_at_is_refused(folder: Path, kind: str) -> None:
    if kind == "2.2":
        assert model_in(folder, text_tokens=513).image_input == ImageInput()
        return
    with pytest.raises(UserError, match=r"model\.text_tokens = 513: expected at most 512"):
        model_in(folder, text_tokens=513)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"image_dim": 10}, "image_dim = 10, added_kv_proj_dim = None"),
        ({"image_dim": 10, "added_kv_proj_dim": 12}, "added_kv_proj_dim = 12: expected the network's width 24"),
    ],
)
def test_a_config_of_half_an_image_is_refused(folder: Path, changes: dict[str, int], found: str) -> None:
    path = folder / "config.json"
    plain = {"image_dim": None, "added_kv_proj_dim": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | plain | changes))
    with pytest.raises(UserError, match=found):
        model_in(folder)


def test_an_export_is_an_image_to_video_pipeline_s(module: WanTransformer3DModel, folder: Path, tmp_path: Path) -> None:
    model, weights = model_in(folder), {name: t + 1 for name, t in module.state_dict().items()}
    export_diffusers(weights, model, tmp_path / "out")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(t, weights[name]) for name, t in again.state_dict().items())
    assert model_in(tmp_path / "out").image_input == model.image_input
    assert model.export_parts(weights, tmp_path / "parts")["_class_name"] == "WanImageToVideoPipeline"
    section = Section.model_validate({"family": "wan", "config": CONFIG | CHANNELS, "boundary_ratio": 0.9})
    pair = build(section, None, KEY)
    assert isinstance(pair, WanExperts) and pair.image_input == ImageInput()
    both = {f"{which}.{name}": t for which in FOLDERS for name, t in pair.expert.build().state_dict().items()}
    assert pair.export_parts(both, tmp_path / "pair")["_class_name"] == "WanImageToVideoPipeline"
