"""The VAE encodes what diffusers' own encodes, scaled as its pipeline expects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    LTXPipeline,
)

from sgmd_dist.autoencoder import Autoencoder
from sgmd_dist.errors import UserError


def pictures(num_frames: int = 13, height: int = 32, width: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (num_frames, height, width, 3), generator=generator, dtype=torch.uint8)


def test_latents_are_the_mode_scaled_by_mean_and_std(video_pipeline: Path) -> None:
    rgb = pictures()
    vae = AutoencoderKLWan.from_pretrained(video_pipeline / "vae").eval()
    with torch.no_grad():
        mode = vae.encode((rgb.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]).latent_dist.mode()[0]
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    autoencoder = Autoencoder.load(video_pipeline / "vae")
    latents = autoencoder.encode(rgb)
    assert latents.shape == autoencoder.latent_shape(13, 32, 48) == (3, 4, 4, 6)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, (mode - mean) / std)


def test_decode_undoes_the_scaling(video_pipeline: Path) -> None:
    autoencoder = Autoencoder.load(video_pipeline / "vae")
    vae = AutoencoderKLWan.from_pretrained(video_pipeline / "vae").eval()
    rgb = pictures(5)
    with torch.no_grad():
        mode = vae.encode((rgb.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]).latent_dist.mode()
        expected = (vae.decode(mode).sample[0] + 1) * 127.5
    decoded = autoencoder.decode(autoencoder.encode(rgb))
    assert decoded.shape == rgb.shape and decoded.dtype == torch.uint8
    assert (decoded - expected.permute(1, 2, 3, 0)).abs().max() < 0.51


def test_bfloat16_is_near(video_pipeline: Path) -> None:
    exact = Autoencoder.load(video_pipeline / "vae").encode(pictures(5))
    near = Autoencoder.load(video_pipeline / "vae", dtype=torch.bfloat16).encode(pictures(5))
    assert near.dtype == torch.float32 and not torch.equal(near, exact)
    assert (near - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    "video, message",
    [
        ((12, 32, 48), r"12 frames: the VAE takes 4n \+ 1; use 9 or 13"),
        ((0, 32, 48), r"0 frames: the VAE takes 4n \+ 1; use 1 or 5"),
        ((13, 36, 48), "height 36: expected a multiple of the VAE's 8 pixels; use 32 or 40"),
        ((13, 32, 7), "width 7: expected a multiple of the VAE's 8 pixels; use 8 or 16"),
    ],
)
def test_videos_that_it_does_not_take_are_named(
    video_pipeline: Path, video: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Autoencoder.load(video_pipeline / "vae").latent_shape(*video)


SMALL = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
OTHERS = {
    "cogvideox": (lambda: AutoencoderKLCogVideoX(**SMALL, scaling_factor=0.7), (9, 16, 24), (4, 3, 2, 3)),
    "hunyuan": (
        lambda: AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            temporal_compression_ratio=2,
            scaling_factor=1.3,
        ),
        (5, 8, 12),
        (4, 3, 4, 6),
    ),
    "ltx": (
        lambda: AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, False),
            decoder_spatio_temporal_scaling=(True, False),
            decoder_inject_noise=(False,) * 3,
            upsample_residual=(False,) * 2,
            upsample_factor=(1,) * 2,
            timestep_conditioning=True,
            scaling_factor=1.5,
        ),
        (5, 16, 24),
        (4, 3, 2, 3),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_vaes_are_scaled_as_their_pipelines_do(name: str, tmp_path: Path) -> None:
    make, video, shape = OTHERS[name]
    torch.manual_seed(0)
    vae = make().eval()
    if name == "ltx":
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 2)
    vae.save_pretrained(tmp_path / "vae")
    autoencoder = Autoencoder.load(tmp_path / "vae")
    rgb = pictures(*video)
    latents = autoencoder.encode(rgb)
    assert tuple(latents.shape) == autoencoder.latent_shape(*video) == shape
    factor = vae.config.scaling_factor
    with torch.no_grad():
        z = vae.encode((rgb.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]).latent_dist.mode()
        if name == "ltx":
            expected = LTXPipeline._normalize_latents(z, vae.latents_mean, vae.latents_std, factor)
            decoded = vae.decode(z, torch.zeros(1)).sample
        else:
            expected, decoded = z * factor, vae.decode(z).sample
    torch.testing.assert_close(latents, expected[0])
    again = ((decoded[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0)
    assert (autoencoder.decode(latents) - again).abs().max() < 0.51
