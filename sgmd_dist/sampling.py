"""Videos from a network outside of training: few-step samples of a generator, many-step samples of a teacher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sgmd_dist import checkpoint, flow, rng
from sgmd_dist.assemble import Which, build_model, head_of, load_network, load_weights, lora_of
from sgmd_dist.batch import padded
from sgmd_dist.data.encode import NEGATIVE_PROMPT, TextEncoder, known_encoding
from sgmd_dist.data.sources import captions_in
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape, VideoModel
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.rollout import Network, guided, sample


@dataclass(frozen=True)
class Prompts:
    """Encoded captions: `embeds` `[N, T, D]` and `negative` `[1, T, D]`, zero-padded to T tokens."""

    captions: list[str]
    embeds: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Source:
    """A recipe with the checkpoint that holds its trained weights."""

    recipe: Recipe
    checkpoint: Path
    model: VideoModel

    def network(self, which: Which, device: torch.device) -> Network:
        """A trained network of the checkpoint."""
        role = which.partition(".")[0]
        lora, head = lora_of(self.recipe, role, self.model), head_of(self.recipe, role, self.model)
        weights = load_weights(self.checkpoint, which, self.model, lora, head)
        return load_network(self.model, weights, device, self.recipe.run.seed, lora)

    def teacher(self, device: torch.device) -> Network:
        """The teacher that the recipe names."""
        return load_network(build_model(self.recipe, "teacher"), None, device, self.recipe.run.seed)

    def beginning(self, device: torch.device) -> Network:
        """The generator before training."""
        return load_network(build_model(self.recipe, "generator"), None, device, self.recipe.run.seed)

    @property
    def few_steps(self) -> tuple[int, float]:
        """Number of steps and time shift of the chain that the generator was trained for.

        Raises:
            UserError: the recipe's objective trains no few-step generator.
        """
        found = few_steps_of(self.recipe)
        if found is None:
            raise UserError(
                f"{self.checkpoint}: objective.name = {self.recipe.objective.name} trains no few-step generator; give a"
                " distillation's checkpoint, or sample with --steps and --shift"
            )
        return found

    @property
    def pretrained(self) -> Path | None:
        """The pipeline folder with VAE and text encoder."""
        folder = self.recipe.model.pretrained
        return None if folder is None else Path(folder)


def few_steps_of(recipe: Recipe) -> tuple[int, float] | None:
    """Number of steps and time shift of the chain that a recipe trains a generator for; None where it trains none."""
    objective = recipe.objective.model_dump()
    return (objective["student_steps"], objective["sigma_shift"]) if "student_steps" in objective else None


def open_source(path: Path) -> Source:
    """A run folder (its newest checkpoint) or a checkpoint.

    Raises:
        UserError: there is no checkpoint, or what its recipe names is missing.
    """
    found = checkpoint.find(path)
    recipe = load_recipe(found / checkpoint.RECIPE_FILE)
    try:
        return Source(recipe, found, build_model(recipe, "generator"))
    except UserError as error:
        raise UserError(f"{found / checkpoint.RECIPE_FILE}: {error}") from None


def read_captions(words: Sequence[str]) -> list[str]:
    """Captions from the command line: each word is a caption, or a file with one caption per line.

    Raises:
        UserError: a file cannot be read, or a word looks like one and is none.
    """
    captions: list[str] = []
    for word in words:
        looks_like_file = word.endswith(".txt") or os.path.isfile(word)  # of a long caption Path raises
        captions += captions_in(word, f"--prompts {word}") if looks_like_file else [word]
    return captions


def check_takes_prompts(model: VideoModel, said: str) -> None:
    """Refuse a model whose videos need more than captions that are encoded here.

    Raises:
        UserError: it begins with an image, or its captions are encoded elsewhere; the message begins with `said`.
    """
    if model.image_input is not None:
        raise UserError(
            f"{said}: this is an image-to-video model, and prompts alone say nothing of the image; export it with"
            " launch/export.py --pipeline and call the pipeline with an image"
        )
    known_encoding(model.text_encoding, said)


def encode_prompts(recipe: Recipe, captions: Sequence[str]) -> Prompts:
    """Encode captions with the recipe's text encoder.

    Raises:
        UserError: the recipe has no text encoder folder, or its model takes more than prompts.
    """
    folder = recipe.data.text_encoder or recipe.model.pretrained
    if folder is None:
        raise UserError("data.text_encoder: prompts need a text encoder; set it to a diffusers folder with one")
    return encode_with(Path(folder), build_model(recipe, "generator"), recipe.model.text_tokens, captions)


def encode_together(folder: Path, model: VideoModel, tokens: int, captions: Sequence[str]) -> Prompts:
    """`encode_with` on rank 0, whose host alone holds the text encoder, handed to all. Collective.

    Raises:
        UserError: the text encoder cannot be read; on every rank.
    """
    found: list[Prompts | None] = [None]

    def encode() -> None:
        if dist.get_rank() == 0:
            found[0] = encode_with(folder, model, tokens, captions)

    checkpoint.together(encode)
    dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def encode_with(folder: Path, model: VideoModel, tokens: int, captions: Sequence[str]) -> Prompts:
    """Encode captions with the text encoder of a diffusers folder, as prompts of `tokens` tokens for `model`.

    Raises:
        UserError: the text encoder cannot be read, or is another model's; or the model takes more than prompts.
    """
    check_takes_prompts(model, str(folder))
    encoder = TextEncoder.from_pretrained(folder, encoding=model.text_encoding)
    if encoder.width != model.text_dim():
        raise UserError(
            f"{folder}: its text encoder makes embeddings of {encoder.width} numbers, the model's text_dim is"
            f" {model.text_dim()}; name the folder of this model's text encoder"
        )
    texts = [*encoder.encode(captions), *encoder.encode([NEGATIVE_PROMPT])]
    embeds = torch.stack([padded(embed.bfloat16(), tokens) for embed in texts])  # as shards store them
    return Prompts(list(captions), embeds[:-1], embeds[-1:])


def noise_of(latent_shape: LatentShape, seed: int, number: int) -> Tensor:
    """The noise from which the video of prompt `number` (from 0) begins: float32 on the CPU."""
    return rng.normal(latent_shape, seed, "sample", number)


@torch.no_grad()
def sample_video(
    network: Network,
    prompts: Prompts,
    number: int,
    latent_shape: LatentShape,
    *,
    sigmas: Sequence[float],
    seed: int,
    guidance_scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The video of prompt `number`: `[C, F, H, W]` float32 on the CPU, by Euler steps over `sigmas`."""
    embeds, negative = prompts.embeds[number : number + 1].to(device), prompts.negative.to(device)
    noise = noise_of(latent_shape, seed, number)[None].to(device)
    return flow.integrate(guided(network, embeds, negative, guidance_scale), noise, sigmas)[0].cpu()


def sample_videos(
    network: Network,
    prompts: Prompts,
    latent_shape: LatentShape,
    *,
    num_steps: int,
    shift: float,
    seed: int,
    guidance_scale: float = 1.0,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One video per prompt: `[N, C, F, H, W]` float32 on the CPU; video i depends on (seed, i) and its prompt."""
    videos = []
    for start in range(0, len(prompts.captions), batch_size):
        embeds = prompts.embeds[start : start + batch_size].to(device)
        numbers = range(start, start + len(embeds))
        noise = torch.stack([noise_of(latent_shape, seed, number) for number in numbers]).to(device)
        velocity = guided(network, embeds, prompts.negative.to(device), guidance_scale)
        videos.append(sample(velocity, noise, num_steps, shift).cpu())
    return torch.cat(videos)
