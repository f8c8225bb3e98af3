"""The world's videos and the VAE that sees them: both ways, the world's own latents come out."""

from __future__ import annotations

import pytest
import torch

from sgmd_dist.autoencoder import Autoencoder
from sgmd_dist.data.world import AMPLITUDE, World
from sgmd_dist.data.world_videos import SPATIAL, TEMPORAL, world_vae, world_video


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder(world_vae())


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return World(num_frames=3, colours=("red",)).sample(0, 0).latents


def test_a_video_has_the_strides_of_wans_vae(latents: torch.Tensor, autoencoder: Autoencoder) -> None:
    video = world_video(latents)
    assert video.shape == (2 * TEMPORAL + 1, 12 * SPATIAL, 12 * SPATIAL, 3) and video.dtype == torch.uint8
    assert autoencoder.latent_shape(*video.shape[:3]) == tuple(latents.shape)


def test_the_vae_finds_the_latents_of_a_video(latents: torch.Tensor, autoencoder: Autoencoder) -> None:
    """As exactly as 8 bits tell them: half a level of 255 is AMPLITUDE / 255."""
    assert (autoencoder.encode(world_video(latents)) - latents).abs().max() < 1.1 * AMPLITUDE / 255


def test_the_vae_paints_the_video_of_the_latents(latents: torch.Tensor, autoencoder: Autoencoder) -> None:
    difference = autoencoder.decode(latents).int() - world_video(latents).int()
    assert difference.abs().max() <= 1
