"""Latents become pictures, and pictures become files that other programs read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sgmd_dist.decode import decoder, latents_as_rgb, write_video
from sgmd_dist.errors import UserError


def checkers(num_frames: int = 5, height: int = 16, width: int = 24) -> Tensor:
    """uint8 pictures `[F, H, W, 3]`: a red and a blue half that change places at every frame."""
    rgb = torch.zeros(num_frames, height, width, 3, dtype=torch.uint8)
    rgb[0::2, :, : width // 2, 0] = rgb[1::2, :, width // 2 :, 0] = 255
    rgb[0::2, :, width // 2 :, 2] = rgb[1::2, :, : width // 2, 2] = 255
    return rgb


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# Latents that are the video


def test_latents_of_three_channels_are_red_green_blue() -> None:
    latents = torch.zeros(3, 2, 4, 6)
    latents[0, 1, 2, 5] = 3.0
    latents[2, 0] = -3.0
    rgb = latents_as_rgb(latents)
    assert rgb.shape == (2, 4, 6, 3) and rgb.dtype == torch.uint8 and rgb.is_contiguous()
    assert rgb[1, 2, 5].tolist() == [255, 128, 128]
    assert rgb[0, 0, 0].tolist() == [128, 128, 0]


def test_values_beyond_black_and_white_are_clipped() -> None:
    assert latents_as_rgb(torch.full((3, 1, 1, 1), 99.0)).unique().tolist() == [255]
    assert latents_as_rgb(torch.full((3, 1, 1, 1), -99.0)).unique().tolist() == [0]


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_any_number_of_channels_makes_a_picture(channels: int) -> None:
    latents = torch.randn(channels, 2, 4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    rgb = latents_as_rgb(latents)
    assert rgb.shape == (2, 4, 6, 3)
    assert torch.equal(rgb[..., 0], rgb[..., 1]) == (channels < 3)


@pytest.mark.parametrize("pretrained", [None, "nowhere", "without_vae"])
def test_without_a_vae_the_latents_are_the_video(tmp_path: Path, pretrained: str | None) -> None:
    (tmp_path / "without_vae" / "transformer").mkdir(parents=True)
    assert decoder(tmp_path / pretrained if pretrained else None) is latents_as_rgb


# The VAE


MEAN, STD = [0.5, -1.0, 0.0, 2.0], [2.0, 1.0, 0.5, 3.0]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline's folder with a tiny random Wan VAE of 4 latent channels."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=MEAN, latents_std=STD
    )
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    return tmp_path / "pipeline"


def test_a_vae_decodes_latents_scaled_by_its_own_mean_and_std(pipeline: Path) -> None:
    vae = AutoencoderKLWan.from_pretrained(pipeline / "vae").eval()
    scaled = torch.randn(4, 2, 2, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pixels = vae.decode(scaled[None]).sample[0]
    latents = (scaled - torch.tensor(MEAN).view(4, 1, 1, 1)) / torch.tensor(STD).view(4, 1, 1, 1)
    rgb = decoder(pipeline)(latents)
    assert rgb.shape == (5, 16, 24, 3) and rgb.dtype == torch.uint8
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0)
    assert (rgb - expected).abs().max() < 0.51


def rewritten(**changes: object) -> Callable[[Path], None]:
    def damage(vae: Path) -> None:
        config = json.loads((vae / "config.json").read_text())
        (vae / "config.json").write_text(json.dumps(config | changes))

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no config": lambda vae: (vae / "config.json").unlink(),
    "half a config": lambda vae: (vae / "config.json").write_text("{"),
    "a list": lambda vae: (vae / "config.json").write_text("[]"),
    "null": lambda vae: (vae / "config.json").write_text("null"),
    "an empty config": lambda vae: (vae / "config.json").write_text("{}"),
    "another size": rewritten(z_dim=8),
    "no scale": rewritten(latents_mean=None),
    "no weights": lambda vae: next(vae.glob("*.safetensors")).unlink(),
    "other weights": lambda vae: save_file({"x": torch.zeros(1)}, next(vae.glob("*.safetensors"))),
    "empty weights": lambda vae: next(vae.glob("*.safetensors")).write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_vae_is_named(pipeline: Path, damage: Callable[[Path], object]) -> None:
    damage(pipeline / "vae")
    with pytest.raises(
        UserError, match=r"pipeline/vae: cannot be read as an AutoencoderKLWan \(.*\); download it again"
    ):
        decoder(pipeline)


def test_another_family_s_vae_is_refused_although_its_weights_would_fit(pipeline: Path) -> None:
    rewritten(_class_name="AutoencoderKL")(pipeline / "vae")
    with pytest.raises(UserError, match=r"config\.json describes AutoencoderKL"):
        decoder(pipeline)


# Files


def test_mp4_has_every_frame_at_its_size_and_rate(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "video.mp4"
    write_video(path, checkers(), frames_per_second=8)
    frames = frames_of(path)
    assert frames.shape == (5, 16, 24, 3)
    assert np.abs(frames[:, 4:12, [4, 19]].astype(int) - checkers().numpy()[:, 4:12, [4, 19]]).max() < 40
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 8


def test_mp4_of_odd_sizes_loses_the_last_row_and_column(tmp_path: Path) -> None:
    write_video(tmp_path / "odd.mp4", checkers(height=13, width=11))
    assert frames_of(tmp_path / "odd.mp4").shape == (5, 12, 10, 3)


def test_gif_is_an_endless_animation(tmp_path: Path) -> None:
    write_video(tmp_path / "video.gif", checkers(height=13, width=11), frames_per_second=10)
    with Image.open(tmp_path / "video.gif") as picture:
        assert (picture.n_frames, picture.size) == (5, (11, 13))
        assert picture.info["loop"] == 0 and picture.info["duration"] == 100
        picture.seek(1)
        assert np.array_equal(np.asarray(picture.convert("RGB")), checkers(height=13, width=11)[1].numpy())


def test_png_shows_the_frames_side_by_side(tmp_path: Path) -> None:
    rgb = checkers(num_frames=3, height=13, width=11)
    write_video(tmp_path / "video.png", rgb)
    with Image.open(tmp_path / "video.png") as picture:
        assert np.array_equal(np.asarray(picture), torch.cat(list(rgb), dim=1).numpy())


@pytest.mark.parametrize("ending", ["mp4", "gif", "png"])
def test_a_single_frame_is_a_video_too(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"one.{ending}"
    write_video(path, checkers(num_frames=1))
    assert path.stat().st_size > 0


@pytest.mark.parametrize("name", ["video.avi", "video", "video.MP4x"])
def test_an_ending_that_cannot_be_written_is_named_with_those_that_can(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: cannot write '.*' files; expected one of \.mp4, \.gif, \.png"):
        write_video(tmp_path / name, checkers())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["mp4", "gif", "png"])
def test_what_makes_no_video_is_refused_with_the_numbers(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"video.{ending}"
    with pytest.raises(UserError, match="0 frames per second: expected at least 1"):
        write_video(path, checkers(), frames_per_second=0)
    with pytest.raises(UserError, match="0 frames of 16 x 24 pixels: expected at least one frame"):
        write_video(path, checkers(num_frames=0))


def test_mp4_of_one_pixel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="5 frames of 1 x 1 pixels: expected at least one frame of 2 x 2"):
        write_video(tmp_path / "video.mp4", checkers(height=1, width=1))


@pytest.mark.parametrize("ending", ["mp4", "gif", "png"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, ending: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / f"folder.{ending}").mkdir()
    for path in (tmp_path / "file" / f"video.{ending}", tmp_path / f"folder.{ending}"):
        with pytest.raises(UserError, match=rf"{path}: cannot be written .*; choose another folder"):
            write_video(path, checkers())
