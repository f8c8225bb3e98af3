"""An exported image-to-video pipeline is a stock one, and gives the videos of our own sampler."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from sgmd_dist.assemble import load_network
from sgmd_dist.autoencoder import Autoencoder
from sgmd_dist.conditions import TextAndImage
from sgmd_dist.data.image_encoder import ImageEncoder
from sgmd_dist.models.wan import Section, build
from sgmd_dist.pipeline import Origin, export_pipeline
from sgmd_dist.rollout import guided, sample


def test_the_stock_pipeline_gives_the_latents_of_our_sampler(image_pipeline: Path, tmp_path: Path) -> None:
    model = build(Section(family="wan", compute_dtype="float32"), str(image_pipeline), "model.pretrained")
    torch.manual_seed(0)
    weights = {name: 0.1 * torch.randn(p.shape) for name, p in model.build().named_parameters()}
    out = tmp_path / "out"
    assert export_pipeline(weights, model, 4, 5.0, Origin("", {}, image_pipeline), out) == len(weights)
    pipe = WanImageToVideoPipeline.from_pretrained(out, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise, text = torch.randn(1, 3, 3, 4, 6), torch.randn(1, 512, 32)
    picture = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)
    found = pipe(
        Image.fromarray(picture.numpy()), prompt_embeds=text, latents=noise, num_frames=9, height=32, width=48,
        num_inference_steps=4, guidance_scale=1.0, output_type="latent",
    ).frames  # fmt: skip
    condition = TextAndImage(
        text,
        Autoencoder.load(image_pipeline / "vae").encode_first(picture.expand(9, -1, -1, -1))[None],
        ImageEncoder.load(image_pipeline).encode(picture)[None],
    )
    network = load_network(model, weights, torch.device("cpu"))
    expected = sample(guided(network, condition, text, 1.0), noise, 4, 5.0)
    assert (expected - noise).abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-4
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]
    assert "pipe(image, prompt, num_inference_steps=4" in (out / "README.md").read_text()
