"""Videos and a pipeline to encode them, made on the spot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

Paint = Callable[[int, int, int], np.ndarray]  # (number of the frame, height, width) -> uint8 [H, W, 3]
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9"}


def numbered(number: int, height: int, width: int) -> np.ndarray:
    """A grey that tells the frame's number: 4 levels a frame, so that no codec mixes them up."""
    return np.full((height, width, 3), 4 * number, np.uint8)


def write_clip(
    path: Path,
    num_frames: int,
    *,
    rate: int | Fraction = 16,
    height: int = 32,
    width: int = 48,
    paint: Paint = numbered,
    pixel_aspect: Fraction | None = None,
) -> None:
    """Write a real video file; the ending decides on container and codec."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(paint(number, height, width), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def clips() -> Callable[..., None]:
    """`write_clip`, for tests of every folder (a conftest is not imported by name)."""
    return write_clip


@pytest.fixture(scope="session")
def video_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: a tiny random Wan VAE of 3 latent channels (strides 4 and 8), and the tiny text encoder."""
    import torch
    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("video_pipeline")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=3,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3],
            latents_std=[0.5, 1.5, 2.0],
        )
    vae.save_pretrained(folder / "vae")
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(Path(__file__).parents[1] / "recipes/tiny_wan" / part, folder / part)
    return folder


@pytest.fixture(scope="session")
def image_pipeline(tmp_path_factory: pytest.TempPathFactory, video_pipeline: Path) -> Path:
    """The same as an image-to-video folder like Wan2.1-I2V's: a tiny random transformer, CLIP model and processor."""
    import torch
    from diffusers import WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("image_pipeline") / "wan"
    shutil.copytree(video_pipeline, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=10, out_channels=3, text_dim=32, freq_dim=16,
            ffn_dim=32, num_layers=1, rope_max_seq_len=32, image_dim=10, added_kv_proj_dim=24,
        )  # fmt: skip
        sizes = {"hidden_size": 10, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        encoder = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4))
    transformer.save_pretrained(folder / "transformer")
    encoder.save_pretrained(folder / "image_encoder")
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor.save_pretrained(folder / "image_processor")
    return folder
