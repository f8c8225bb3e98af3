"""What a world's generator makes before it is trained."""

from __future__ import annotations

from torch import Tensor

from sgmd_dist import rng
from sgmd_dist.benchmarks.science.exact import MixtureWorld
from sgmd_dist.rollout import sample


def untrained_samples(world: MixtureWorld, count: int) -> Tensor:
    """Four-step samples `[count, C, F, H, W]` of a new generator, for `prompts(count)`."""
    embeds, _ = world.prompts(count)
    noise = rng.normal((count, *world.latent_shape), 2, "start")
    module, model = world.networks()["generator"]
    return sample(lambda x, s, level: model.velocity(module, x, s, embeds), noise, 4, world.sigma_shift)
