"""An exported pipeline is a stock one, and the stock pipeline gives the videos of our own sampler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXPipeline, WanPipeline
from tiny_families import FAMILIES, LATENTS
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.assemble import build_model, load_network
from sgmd_dist.batch import padded
from sgmd_dist.card import Origin
from sgmd_dist.data.encode import TextEncoder
from sgmd_dist.errors import UserError
from sgmd_dist.export import Form
from sgmd_dist.models import cogvideox, ltx
from sgmd_dist.models.base import VideoModel
from sgmd_dist.pipeline import export_pipeline, scheduler
from sgmd_dist.recipe import Recipe
from sgmd_dist.rollout import Network, guided, sample


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
def test_the_stock_scheduler_takes_the_trained_sigmas(num_steps: int, shift: float) -> None:
    made = scheduler(num_steps, shift)
    made.set_timesteps(num_steps)
    wanted = torch.tensor(flow.sampling_sigmas(num_steps, shift))
    assert (made.sigmas.double() - wanted).abs().max() < 1e-6
    assert (made.timesteps.double() / 1000 - wanted[:-1]).abs().max() < 1e-6


@pytest.fixture
def model(tiny_recipe: Callable[..., Recipe]) -> VideoModel:
    return build_model(tiny_recipe(), "generator")


@pytest.fixture
def weights(model: VideoModel) -> dict[str, Tensor]:
    return random_weights(model)


def random_weights(model: VideoModel) -> dict[str, Tensor]:
    """Random weights, small enough for velocities of order 1."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model.build().named_parameters()}
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


def load_pipeline(folder: Path) -> Any:
    pipe = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: Any, noise: Tensor, embeds: Tensor) -> Tensor:
    """What the stock pipeline makes of noise `[B, 3, 3, 6, 4]`."""
    return pipe(
        prompt_embeds=embeds, latents=noise, num_frames=9, height=48, width=32, num_inference_steps=4,
        guidance_scale=1.0, output_type="latent",
    ).frames  # fmt: skip


def few_steps(network: Network, noise: Tensor, embeds: Tensor) -> Tensor:
    """What our own sampler makes of it."""
    return sample(guided(network, embeds, embeds[:1], 1.0), noise, 4, 5.0)


@pytest.fixture
def origin(video_pipeline: Path) -> Origin:
    return Origin("run: {name: mine}\n", {"run": "mine", "step": "100"}, video_pipeline)


def test_the_stock_pipeline_gives_the_latents_of_our_sampler(
    model: VideoModel, weights: dict[str, Tensor], origin: Origin, tmp_path: Path
) -> None:
    assert export_pipeline(weights, model, 4, 5.0, origin, tmp_path / "out") == len(weights)
    noise, embeds = torch.randn(2, 3, 3, 6, 4), torch.randn(2, 8, model.text_dim())
    found = latents_of(load_pipeline(tmp_path / "out"), noise, embeds)
    expected = few_steps(load_network(model, weights, torch.device("cpu"), 0), noise, embeds)
    assert (expected - noise).abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-5


def test_a_pair_of_experts_takes_turns_as_in_our_sampler(
    tiny_recipe: Callable[..., Recipe], origin: Origin, tmp_path: Path
) -> None:
    """Two steps each: at sigma 1 and 0.9375, and at 0.8333 and 0.625."""
    model = build_model(tiny_recipe("model.boundary_ratio=0.875"), "generator")
    weights = random_weights(model)
    assert export_pipeline(weights, model, 4, 5.0, origin, tmp_path / "out") == len(weights)
    pipe = load_pipeline(tmp_path / "out")
    assert pipe.config.boundary_ratio == 0.875
    noise, embeds = torch.randn(2, 3, 3, 6, 4), torch.randn(2, 8, model.text_dim())
    network = load_network(model, weights, torch.device("cpu"), 0)
    shifted = {n: w + 0.1 if n.startswith("low.") else w for n, w in weights.items()}
    other = load_network(model, shifted, torch.device("cpu"), 0)
    found, expected = latents_of(pipe, noise, embeds), few_steps(network, noise, embeds)
    assert (few_steps(other, noise, embeds) - expected).abs().max() > 0.1, "the second expert runs"
    assert (found - expected).abs().max() < 1e-5


def test_another_process_loads_the_whole_pipeline_by_its_folder_alone(
    model: VideoModel, weights: dict[str, Tensor], origin: Origin, tmp_path: Path
) -> None:
    """With tokenizer, text encoder and VAE; this package is not there."""
    export_pipeline(weights, model, 4, 5.0, origin, tmp_path / "out", Form(max_shard_size="20KB"))
    noise = torch.randn(1, 3, 2, 6, 4)
    torch.save(noise, tmp_path / "noise.pt")
    code = f"""
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{tmp_path}/out", local_files_only=True)
latents = torch.load("{tmp_path}/noise.pt")
size = dict(height=48, width=32, num_frames=5, max_sequence_length=8)
made = [pipe("a red ball", latents=latents, **size, num_inference_steps=4, guidance_scale=1.0, output_type=kind).frames
        for kind in ("latent", "pt")]
assert not any(name.startswith("sgmd") for name in sys.modules)
torch.save([type(pipe).__name__, *made], "{tmp_path}/made.pt")
"""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    name, latents, video = torch.load(tmp_path / "made.pt")
    assert name == "WanPipeline" and video.shape == (1, 5, 3, 48, 32) and bool(video.isfinite().all())
    (encoded,) = TextEncoder.from_pretrained(tmp_path / "out").encode(["a red ball"])
    network = load_network(model, weights, torch.device("cpu"), 0)
    assert (latents - few_steps(network, noise, padded(encoded.float(), 8)[None])).abs().max() < 1e-5


def test_ltx_video_s_stock_pipeline_gives_the_latents_of_our_sampler(origin: Origin, tmp_path: Path) -> None:
    """Its pipeline hands the scheduler evenly spaced times; one without a VAE has the strides of the real one."""
    family = FAMILIES["ltx"]
    section = ltx.Section.model_validate({"compute_dtype": "float32", "config": family.config})
    model, weights = ltx.build(section, None, "model.pretrained"), family.random().state_dict()
    export_pipeline(weights, model, 4, 5.0, replace(origin, pretrained=None), tmp_path / "out")
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = LTXPipeline.from_pretrained(tmp_path / "out", local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    noise, embeds = torch.randn(2, *LATENTS), torch.randn(2, 8, model.text_dim())
    mask = torch.ones(2, 8)
    mask[1, 5:] = embeds[1, 5:] = 0
    found = pipe(
        prompt_embeds=embeds, prompt_attention_mask=mask, latents=pipe._pack_latents(noise), num_frames=17, height=256,
        width=256, num_inference_steps=4, guidance_scale=1.0, output_type="latent",
    ).frames  # fmt: skip
    network = load_network(model, weights, torch.device("cpu"), 0)
    expected = sample(guided(network, embeds, embeds[:1], 1.0), noise, 4, 5.0)
    assert (expected - noise).abs().max() > 0.1
    assert (pipe._unpack_latents(found, *LATENTS[1:]) - expected).abs().max() < 2e-5


def test_a_family_whose_schedulers_take_no_trained_sigmas_is_refused(origin: Origin, tmp_path: Path) -> None:
    family = FAMILIES["cogvideox"]
    section = cogvideox.Section.model_validate({"config": family.config, "text_tokens": 5})
    model = cogvideox.build(section, None, "model.pretrained")
    with pytest.raises(UserError, match="--pipeline: no scheduler of CogVideoX's diffusers pipeline takes the sigmas"):
        export_pipeline(family.random().state_dict(), model, 4, 5.0, origin, tmp_path / "out")


def test_it_makes_a_video_of_a_prompt(
    model: VideoModel, weights: dict[str, Tensor], origin: Origin, tmp_path: Path
) -> None:
    export_pipeline(weights, model, 4, 5.0, origin, tmp_path / "out")
    pipe = load_pipeline(tmp_path / "out")
    video = pipe("a red ball", height=32, width=48, num_frames=5, num_inference_steps=4, guidance_scale=1.0).frames[0]
    assert video.shape == (5, 32, 48, 3)


def test_the_card_tells_how_to_call_it_and_where_it_came_from(
    model: VideoModel, weights: dict[str, Tensor], origin: Origin, tmp_path: Path
) -> None:
    origin = replace(origin, size={"num_frames": 121, "height": 704, "width": 1280})
    export_pipeline(weights, model, 4, 5.0, origin, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "(prompt, num_frames=121, height=704, width=1280, num_inference_steps=4, guidance_scale=1.0)" in card
    assert "1, 0.9375, 0.8333, 0.625" in card and "| run | mine |" in card
    assert (tmp_path / "out/recipe.yaml").read_text() == origin.recipe


def test_what_the_pretrained_folder_lacks_is_left_out(
    model: VideoModel, weights: dict[str, Tensor], origin: Origin, tmp_path: Path
) -> None:
    pretrained = tmp_path / "pretrained"
    shutil.copytree(origin.pretrained or Path(), pretrained, ignore=shutil.ignore_patterns("vae"))
    export_pipeline(weights, model, 4, 5.0, Origin("", {}, pretrained), tmp_path / "out")
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["vae"] == [None, None] and index["text_encoder"] == ["transformers", "UMT5EncoderModel"]
    (pretrained / "text_encoder/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"text_encoder: cannot be read as a pipeline's text_encoder"):
        export_pipeline(weights, model, 4, 5.0, Origin("", {}, pretrained), tmp_path / "other")
    assert not (tmp_path / "other").exists()
