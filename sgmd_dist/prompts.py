"""Prompts of videos: captions, with the images that those of image-to-video models begin with; and what encoders make
of them.

A file of prompts is text with one caption per line, or, with the ending .jsonl, one object per line:

    {"caption": "a red ball rolls away", "image": "ball.png"}

`image` may be left out, and is relative to the file's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgmd_dist import checkpoint
from sgmd_dist.autoencoder import Autoencoder
from sgmd_dist.batch import padded
from sgmd_dist.conditions import Condition, TextAndImage
from sgmd_dist.data.encode import NEGATIVE_PROMPT, TextEncoder, known_encoding
from sgmd_dist.data.image_encoder import ImageEncoder
from sgmd_dist.data.picture import check_picture, read_picture
from sgmd_dist.data.sources import captions_in, captions_of, latent_shape_of
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import ImageInput, LatentShape, VideoModel
from sgmd_dist.recipe import Recipe

OBJECTS = ".jsonl"
_KEYS = {"caption", "image"}
_EXPECTED = 'expected {"caption": "a red ball rolls away", "image": "ball.png"} on each line, image for image to video'


@dataclass(frozen=True)
class Prompt:
    """What a video is to show: in words, and for image-to-video models the picture file that it begins with."""

    caption: str
    image: Path | None = None


@dataclass(frozen=True)
class Images:
    """What image-to-video networks see of the pictures of N prompts.

    Attributes:
        latents: `[N, C, F, H, W]` bfloat16, see `conditions.TextAndImage`.
        embeds: `[N, M, E]` bfloat16, or None.
        files: of each its path and sha256.
    """

    latents: Tensor
    embeds: Tensor | None
    files: list[dict[str, str]]


@dataclass(frozen=True)
class Prompts:
    """N encoded prompts: `embeds` `[N, T, D]` and `negative` `[1, T, D]`, zero-padded to T tokens; images or none.

    `captions` are of the videos to be made, of which there may be more: video i is of prompt i modulo N.
    """

    captions: list[str]
    embeds: Tensor
    negative: Tensor
    images: Images | None = None

    def condition(self, numbers: Sequence[int], device: torch.device | str) -> Condition:
        """What a network is conditioned on for these of the videos, on `device`."""
        chosen, images = [number % len(self.embeds) for number in numbers], self.images
        text = self.embeds[chosen].to(device)
        if images is None:
            return text
        embeds = None if images.embeds is None else images.embeds[chosen].to(device)
        return TextAndImage(text, images.latents[chosen].to(device), embeds)

    def repeated(self, count: int) -> Prompts:
        """For `count` videos of each prompt, all prompts' first ones first."""
        return replace(self, captions=self.captions * count)

    @property
    def facts(self) -> dict[str, Any]:
        """What videos of these prompts depend on beside captions, for files that tell it; nothing without images."""
        return {} if self.images is None else {"images": self.images.files}


@dataclass(frozen=True)
class ImageSource:
    """A diffusers folder with VAE and image encoder, and the latents' shape of the videos that images begin."""

    folder: Path
    latent_shape: LatentShape


@dataclass(frozen=True)
class Encoders:
    """What encodes prompts for a model: a diffusers folder with its text encoder, T tokens, and for image to video what
    encodes images."""

    model: VideoModel
    text: Path
    text_tokens: int
    image: ImageSource | None = None


def encoders_of(recipe: Recipe, model: VideoModel) -> Encoders:
    """Those of a recipe.

    Raises:
        UserError: the recipe has no folder of a text encoder, or nothing says how large its videos are.
    """
    folder, pretrained = recipe.data.text_encoder or recipe.model.pretrained, recipe.model.pretrained
    if folder is None:
        raise UserError("data.text_encoder: prompts need a text encoder; set it to a diffusers folder with one")
    image = None
    if model.image_input is not None and pretrained is not None:
        image = ImageSource(Path(pretrained), latent_shape_of(recipe, model))
    return Encoders(model, Path(folder), recipe.model.text_tokens, image)


# ------------------------------------------------------------------------------------------------------------ files


def read_prompts(words: Sequence[str], image: Path | None = None) -> list[Prompt]:
    """Prompts from the command line: each word is a caption or a file of prompts; `image` is for those without one.

    Raises:
        UserError: a file cannot be read, or a word looks like one and is none.
    """
    prompts: list[Prompt] = []
    for word in words:
        looks_like_file = word.endswith((".txt", OBJECTS)) or os.path.isfile(word)  # of a long caption Path raises
        prompts += prompts_in(word, f"--prompts {word}") if looks_like_file else [Prompt(word)]
    return [replace(prompt, image=prompt.image or image) for prompt in prompts]


def prompts_in(file: str, said: str) -> list[Prompt]:
    """The prompts of a file; `said` is how the user named it, for messages.

    Raises:
        UserError: there is no such file, or it is none of prompts, or empty.
    """
    lines = captions_in(file, said)
    if not file.endswith(OBJECTS):
        return [Prompt(line) for line in lines]
    return [_parsed(line, Path(file).parent, f"{said}: prompt {number} (from 0)") for number, line in enumerate(lines)]


def prompts_of(recipe: Recipe, file: Path | None) -> list[Prompt]:
    """The prompts of `file`, or else those of the recipe's data.

    Raises:
        UserError: see `prompts_in`; or neither is there.
    """
    if file is not None:
        return prompts_in(str(file), f"--prompts {file}")
    return [Prompt(caption) for caption in captions_of(recipe)]


def _parsed(line: str, folder: Path, said: str) -> Prompt:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise UserError(f"{said}: no JSON ({error}); {_EXPECTED}") from None
    if not isinstance(content, dict) or not content.keys() <= _KEYS:
        raise UserError(f"{said}: {line[:80]}: no object of these keys; {_EXPECTED}")
    caption, image = content.get("caption"), content.get("image")
    if not isinstance(caption, str) or not caption.strip() or not (image is None or (isinstance(image, str) and image)):
        raise UserError(f"{said}: caption = {caption!r}, image = {image!r}; {_EXPECTED}")
    return Prompt(caption.strip(), None if image is None else folder / image)


def check_prompts(prompts: Sequence[Prompt], model: VideoModel, said: str) -> None:
    """Refuse prompts that are not all that a model needs.

    Raises:
        UserError: captions are encoded elsewhere, or the model begins with images and a prompt has none, or one that is
            no picture; the message begins with `said`.
    """
    known_encoding(model.text_encoding, said)
    if model.image_input is None:
        return
    for prompt in prompts:
        if prompt.image is None:
            raise UserError(
                f"{said}: this is an image-to-video model, and '{prompt.caption[:80]}' has no image to begin with; name"
                ' a .jsonl file of prompts, with lines as {"caption": "a red ball rolls away", "image": "ball.png"}'
            )
        check_picture(prompt.image, said)


def digest_of_image(prompt: Prompt) -> str:
    """sha256 of the picture file that a prompt names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return hashlib.sha256((prompt.image or Path()).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--prompts: image {prompt.image}: cannot be read ({error}); mend the path") from None


# --------------------------------------------------------------------------------------------------------- encoding


def encode_together(encoders: Encoders, prompts: Sequence[Prompt], device: torch.device, said: str) -> Prompts:
    """`encode` on rank 0, which alone reads the prompts' files and holds the encoders, handed to all. Collective.

    Raises:
        UserError: see `encode`; on every rank.
    """
    found: list[Prompts | None] = [None]

    def on_rank_0() -> None:
        if dist.get_rank() == 0:
            found[0] = encode(encoders, prompts, device, said)

    checkpoint.together(on_rank_0)
    dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def encode(encoders: Encoders, prompts: Sequence[Prompt], device: torch.device | str, said: str) -> Prompts:
    """Encode prompts: texts on the CPU, images on `device`, where nothing stays.

    Args:
        said: how the user named the prompts, for messages.

    Raises:
        UserError: an encoder cannot be read or is another model's, or the prompts are not what the model takes.
    """
    model = encoders.model
    check_prompts(prompts, model, said)
    captions = [prompt.caption for prompt in prompts]
    embeds = _encode_texts(encoders, captions)
    images = None if model.image_input is None else _encode_images(encoders, model.image_input, prompts, device, said)
    return Prompts(captions, embeds[:-1], embeds[-1:], images)


def _encode_texts(encoders: Encoders, captions: Sequence[str]) -> Tensor:
    """Captions and behind them the negative prompt, `[N + 1, T, D]` bfloat16 as shards store them."""
    folder, model = encoders.text, encoders.model
    encoder = TextEncoder.from_pretrained(folder, encoding=model.text_encoding)
    if encoder.width != model.text_dim():
        raise UserError(
            f"{folder}: its text encoder makes embeddings of {encoder.width} numbers, the model's text_dim is"
            f" {model.text_dim()}; name the folder of this model's text encoder"
        )
    texts = [*encoder.encode(captions), *encoder.encode([NEGATIVE_PROMPT])]
    return torch.stack([padded(embed.bfloat16(), encoders.text_tokens) for embed in texts])


def _encode_images(
    encoders: Encoders, taken: ImageInput, prompts: Sequence[Prompt], device: torch.device | str, said: str
) -> Images:
    source = encoders.image
    if source is None:
        raise UserError(
            f"{said}: images of an image-to-video model need its VAE, and no folder has one; name the model's"
            " diffusers folder by model.pretrained, or with --pretrained"
        )
    try:
        return _encode_pictures(source, taken, prompts, device, said)
    finally:
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()  # a training may be about to need it


def _encode_pictures(
    source: ImageSource, taken: ImageInput, prompts: Sequence[Prompt], device: torch.device | str, said: str
) -> Images:
    vae = Autoencoder.load(source.folder / "vae", device)
    num_frames, height, width = vae.video_size(source.latent_shape)
    encoder = ImageEncoder.of_input(source.folder, taken, device)
    latents, embeds = [], []
    for prompt in prompts:
        assert prompt.image is not None, "check_prompts asks for one"
        picture = read_picture(prompt.image, height, width, said)
        latents.append(vae.encode_first(picture.expand(num_frames, -1, -1, -1)).bfloat16())
        embeds += [] if encoder is None else [encoder.encode(picture).bfloat16()]
    files = [{"file": str(prompt.image), "sha256": digest_of_image(prompt)} for prompt in prompts]
    return Images(torch.stack(latents), torch.stack(embeds) if embeds else None, files)
