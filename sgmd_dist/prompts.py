"""Prompts of videos: captions, with the images that those of image-to-video models begin with; and what encoders make
of them.

A file of prompts is text with one caption per line, or, with the ending .jsonl, one object per line:

    {"caption": "a red ball rolls away", "image": "ball.png"}

`image` may be left out, and is relative to the file's folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor

from sgmd_dist import checkpoint
from sgmd_dist.autoencoder import Autoencoder
from sgmd_dist.batch import padded
from sgmd_dist.checkpoint.folder import digest
from sgmd_dist.conditions import Condition, TextAndImage
from sgmd_dist.data.encode import NEGATIVE_PROMPT, TextEncoder, known_encoding
from sgmd_dist.data.image_encoder import IMAGE_PARTS, ImageEncoder
from sgmd_dist.data.manifest import json_lines
from sgmd_dist.data.picture import check_picture, read_picture
from sgmd_dist.data.sources import captions_in, captions_of, latent_shape_of, text_encoder_folder
from sgmd_dist.errors import UserError, describe
from sgmd_dist.models.base import ImageInput, LatentShape, VideoModel
from sgmd_dist.recipe import Recipe

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
    """What encodes images: diffusers folders with the VAE and with the image encoder of models that take its
    embeddings, and the latents' shape of the videos that images begin."""

    vae: Path
    image_encoder: Path
    latent_shape: LatentShape


@dataclass(frozen=True)
class Encoders:
    """What encodes prompts for a model: a diffusers folder with its text encoder, T tokens, and for image to video what
    encodes images."""

    model: VideoModel
    text: Path
    text_tokens: int
    image: ImageSource | None = None


def encoders_of(recipe: Recipe, model: VideoModel, said: str) -> Encoders:
    """Those of a recipe; `said` is how the user named the prompts, for messages.

    Raises:
        UserError: the recipe has no folder of a text encoder.
    """
    pretrained, image = recipe.model.pretrained, None
    if model.image_input is not None and pretrained is not None:
        image = ImageSource(Path(pretrained), Path(pretrained), latent_shape_of(recipe, model))
    return Encoders(model, text_encoder_folder(recipe, said), recipe.model.text_tokens, image)


def image_parts(encoders: Encoders, said: str) -> list[Path]:
    """The folders of what encodes images for the model, none for text to video.

    Raises:
        UserError: they are not there; the message begins with `said`.
    """
    taken, source = encoders.model.image_input, encoders.image
    if taken is None:
        return []
    if source is None:
        raise UserError(
            f"{said}: images of an image-to-video model need its VAE, and no folder has one; name the model's"
            " diffusers folder by model.pretrained, or with --pretrained"
        )
    parts = [source.vae / "vae", *(source.image_encoder / part for part in IMAGE_PARTS if taken.embed_dim)]
    for part in parts:
        if not part.is_dir():
            raise UserError(
                f"{said}: {part}: no such folder, and the model's images need it; download it too, or name a diffusers"
                " folder that has it by model.pretrained, or with --pretrained"
            )
    return parts


# ------------------------------------------------------------------------------------------------------------ files


def read_prompts(words: Sequence[str], image: Path | None = None) -> list[Prompt]:
    """Prompts from the command line: each word is a caption or a file of prompts; `image` is for those without one.

    Raises:
        UserError: a file cannot be read, or a word looks like one and is none; or `image` is no picture.
    """
    if image is not None:
        check_picture(image, "--image")
    prompts: list[Prompt] = []
    for word in words:
        looks_like_file = word.endswith(".txt") or _holds_objects(word) or os.path.isfile(word)  # Path raises of longer
        prompts += prompts_in(word, f"--prompts {word}") if looks_like_file else [Prompt(word)]
    return [replace(prompt, image=prompt.image or image) for prompt in prompts]


def prompts_in(file: str, said: str) -> list[Prompt]:
    """The prompts of a file; `said` is how the user named it, for messages.

    Raises:
        UserError: there is no such file, or it is none of prompts, or empty.
    """
    if not _holds_objects(file):
        return [Prompt(line) for line in captions_in(file, said)]
    path = Path(file)
    try:
        prompts = [_parsed(values, path.parent, f"{path}, line {line}") for line, values in json_lines(path)]
    except FileNotFoundError:
        raise UserError(f"{said}: no such file (working directory {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{said}: cannot be read as UTF-8 text ({error}); {_EXPECTED}") from None
    if not prompts:
        raise UserError(f"{said}: the file holds no prompts; {_EXPECTED}")
    return prompts


def _holds_objects(file: str) -> bool:
    return file.lower().endswith(".jsonl")


def prompts_of(recipe: Recipe, model: VideoModel, file: Path | None) -> list[Prompt]:
    """The prompts of `file`, or else those of the recipe's data.

    Raises:
        UserError: see `prompts_in`; or neither is there.
    """
    if file is not None:
        return prompts_in(str(file), f"--prompts {file}")
    if model.image_input is not None:
        raise UserError(f"--prompts: an image-to-video model needs a .jsonl file of prompts with images; {_EXPECTED}")
    return [Prompt(caption) for caption in captions_of(recipe)]


def _parsed(values: Mapping[str, Any], folder: Path, where: str) -> Prompt:
    if unknown := values.keys() - _KEYS:
        raise UserError(f"{where}: '{min(unknown)}' is no key of a prompt; {_EXPECTED}")
    caption, image = values.get("caption"), values.get("image")
    if not isinstance(caption, str) or not (text := " ".join(caption.split())):
        raise UserError(f"{where}: caption = {caption!r}; {_EXPECTED}")
    if not (image is None or (isinstance(image, str) and image)):
        raise UserError(f"{where}: image = {image!r}; {_EXPECTED}")
    if any("\ud800" <= letter <= "\udfff" for letter in text + (image or "")):
        raise UserError(f"{where}: holds half of a character (\\ud800 to \\udfff); write the whole one")
    return Prompt(text, None if image is None else folder / image)


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
                ' a .jsonl file of prompts, with lines as {"caption": "a red ball rolls away", "image": "ball.png"}, or'
                " (launch/sample.py) one image for all with --image"
            )
        check_picture(prompt.image, said)


# --------------------------------------------------------------------------------------------------------- encoding


def encode_together(
    encoders: Encoders, prompts: Callable[[], Sequence[Prompt]], device: torch.device, said: str
) -> Prompts:
    """`encode` on rank 0, which alone reads the prompts and their images and holds the encoders, handed to all.
    Collective.

    Raises:
        UserError: see `encode`, or as `prompts` raises it; on every rank.
    """
    found: list[Prompts | None] = [None]

    def on_rank_0() -> None:
        if dist.get_rank() == 0:
            found[0] = encode(encoders, prompts(), device, said)

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
    check_prompts(prompts, encoders.model, said)
    image_parts(encoders, said)
    captions = [prompt.caption for prompt in prompts]
    embeds = _encode_texts(encoders, captions)
    return Prompts(captions, embeds[:-1], embeds[-1:], _encode_images(encoders, prompts, device, said))


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
    encoders: Encoders, prompts: Sequence[Prompt], device: torch.device | str, said: str
) -> Images | None:
    taken, source = encoders.model.image_input, encoders.image
    if taken is None or source is None:
        return None
    try:
        return _encode_pictures(source, taken, prompts, device, said)
    except torch.OutOfMemoryError as error:
        logger.warning("{}: images cannot be encoded on {} ({}); the CPU does it", said, device, describe(error))
    finally:
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()  # a training may be about to need it
    return _encode_pictures(source, taken, prompts, "cpu", said)


def _encode_pictures(
    source: ImageSource, taken: ImageInput, prompts: Sequence[Prompt], device: torch.device | str, said: str
) -> Images:
    vae = Autoencoder.load(source.vae / "vae", device)
    num_frames, height, width = vae.video_size(source.latent_shape)
    if (made := vae.latent_shape(num_frames, height, width)) != source.latent_shape:
        raise UserError(
            f"{source.vae / 'vae'}: makes latents {made} of {num_frames}x{height}x{width}, the model takes"
            f" {source.latent_shape}; name the folder of this model's VAE"
        )
    encoder = ImageEncoder.of_input(source.image_encoder, taken, device)
    latents, embeds, files = [], [], []
    for prompt in prompts:
        assert prompt.image is not None, "check_prompts asks for one"
        picture = read_picture(prompt.image, height, width, said)
        latents.append(vae.encode_first(picture.expand(num_frames, -1, -1, -1)).bfloat16())
        embeds += [] if encoder is None else [encoder.encode(picture).bfloat16()]
        files.append({"file": str(prompt.image), "sha256": digest(prompt.image)})
    return Images(torch.stack(latents), torch.stack(embeds) if embeds else None, files)
