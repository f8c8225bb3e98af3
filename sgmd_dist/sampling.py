"""Videos from a network outside of training: few-step samples of a generator, many-step samples of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sgmd_dist import checkpoint, flow, rng
from sgmd_dist.assemble import Which, build_model, head_of, load_network, load_weights, lora_of
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape, VideoModel
from sgmd_dist.prompts import Prompts
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.rollout import Network, guided, sample


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
    condition, negative = prompts.condition([number], device), prompts.negative.to(device)
    noise = noise_of(latent_shape, seed, number)[None].to(device)
    return flow.integrate(guided(network, condition, negative, guidance_scale), noise, sigmas)[0].cpu()


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
        numbers = range(start, min(start + batch_size, len(prompts.captions)))
        noise = torch.stack([noise_of(latent_shape, seed, number) for number in numbers]).to(device)
        velocity = guided(network, prompts.condition(numbers, device), prompts.negative.to(device), guidance_scale)
        videos.append(sample(velocity, noise, num_steps, shift).cpu())
    return torch.cat(videos)
