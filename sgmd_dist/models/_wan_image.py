"""Image to video in the Wan family: the image among the network's input channels, and in 2.1 its CLIP embeddings.

An image-to-video transformer sees 2 C + 4 channels: the C of the noisy latents, 4 of a mask, and the C that the VAE
makes of the image followed by grey frames. The mask is 1 in the first latent frame and 0 in all others, one channel for
each frame of a latent one, as in diffusers' `WanImageToVideoPipeline`. Wan2.1's also have cross attention to embeddings
of the image, before those of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgmd_dist.conditions import Condition, TextAndImage
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import ImageInput

MASK_CHANNELS = 4  # frames of a latent frame
TEXT_TOKENS = 512  # of networks with image embeddings, whose context ends with so many: as in diffusers
NUM_EMBEDS = 257  # of CLIP ViT-H/14 at 224 pixels: a class and 16 x 16 patches
_UNUSED = ("norm_added_q",)  # of queries that the network does not have; diffusers passes over it too


def image_input_of(config: Mapping[str, Any]) -> ImageInput | None:
    """What a `WanTransformer3DModel` of these arguments takes of an image; None for text to video."""
    if config["in_channels"] == config["out_channels"]:
        return None
    return ImageInput() if config["image_dim"] is None else ImageInput(NUM_EMBEDS, config["image_dim"], _UNUSED)


def wrong_channels(config: Mapping[str, Any]) -> str:
    """What of these arguments makes neither a text-to-video nor an image-to-video network; empty where all is well."""
    taken, made = config["in_channels"], config["out_channels"]
    image_dim, projected = config["image_dim"], config["added_kv_proj_dim"]
    if taken not in (made, 2 * made + MASK_CHANNELS):
        return (
            f"in_channels = {taken}, out_channels = {made}: expected equal numbers, or in_channels ="
            f" {2 * made + MASK_CHANNELS} for image to video: latents, a mask of {MASK_CHANNELS}, latents of the image"
        )
    if (image_dim is None) != (projected is None) or (image_dim is not None and taken == made):
        return (
            f"image_dim = {image_dim}, added_kv_proj_dim = {projected}, in_channels = {taken}: expected both or none,"
            " and both with an image among the channels alone"
        )
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if projected not in (None, width):
        return f"added_kv_proj_dim = {projected}: expected the network's width {width}"
    return ""


def network_inputs(image_input: ImageInput | None, latents: Tensor, condition: Condition) -> dict[str, Tensor]:
    """Latents and conditions as a `WanTransformer3DModel` takes them, in the latents' dtype.

    Args:
        image_input: of the network.
        latents: `[B, C, F, H, W]`.

    Raises:
        UserError: the network needs an image, or its embeddings, and there are none.
    """
    if image_input is None:
        text = condition.text if isinstance(condition, TextAndImage) else condition
        return {"hidden_states": latents, "encoder_hidden_states": text.to(latents.dtype)}
    if not isinstance(condition, TextAndImage) or (image_input.embed_dim and condition.embeds is None):
        lacking = "image" if not isinstance(condition, TextAndImage) else "embeddings of the image"
        raise UserError(
            f"model: this is an image-to-video model, and there is no {lacking} to begin with; training takes it from"
            " shards of launch/prepare.py videos, samples from prompts with images"
        )
    mask = latents.new_zeros(len(latents), MASK_CHANNELS, *latents.shape[2:])
    mask[:, :, 0] = 1
    text = condition.text.to(latents.dtype)
    inputs = {"hidden_states": torch.cat([latents, mask, condition.latents.to(latents.dtype)], 1)}
    if image_input.embed_dim and condition.embeds is not None:
        text = pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[1]))
        inputs["encoder_hidden_states_image"] = condition.embeds.to(latents.dtype)
    return {**inputs, "encoder_hidden_states": text}
