"""What `data.shards` may say besides paths: sources that write their own shards once.

`world:moving_shapes`   the synthetic video world, with latents
`prompts:FILE`          one caption per line, for data-free distillation; the latent shape comes from `data.video`

Shards that lie elsewhere go through the node cache (sgmd_dist/data/cache.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from sgmd_dist.data.cache import ShardCache
from sgmd_dist.data.digest import content_digest
from sgmd_dist.data.encode import NEGATIVE_PROMPT, TextEncoder, known_encoding
from sgmd_dist.data.format import write_negative_prompt
from sgmd_dist.data.index import ShardIndex, consolidate
from sgmd_dist.data.record import Held
from sgmd_dist.data.remote import redacted
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.data.world import World, write_world_shards
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape, VideoModel
from sgmd_dist.recipe import Recipe, shard_list

WORLD = "world:"
PROMPTS = "prompts:"
TEXT_PARTS = ("text_encoder", "tokenizer")
WORLDS = {"moving_shapes": World}
WORLD_SAMPLES = 4096
WORLD_SEED = 0
_NO_CAPTIONS = (".jsonl", ".json", ".csv")
MAX_SILENCE_S = 60.0  # of a server or a command, before it has failed


def open_shards(recipe: Recipe, model: VideoModel) -> ShardIndex:
    """The index of `data.shards`; shards that a source makes are written under `run.dir`/cache first.

    Raises:
        UserError: a source, file or folder is missing, or the shards do not fit the recipe's model.
    """
    check_sources(recipe, model)
    paths = [str(_materialize(source, recipe, model)) for source in shard_list(recipe.data.shards)]
    index = ShardIndex.open(paths, shard_cache(recipe))
    _check_fit(index, recipe, model)
    _check_negative_prompt(index, recipe, model)
    return index


def shard_cache(recipe: Recipe) -> ShardCache:
    """The node cache that `data.cache` and `data.cache_gb` describe; one for all who ask in this process."""
    data = recipe.data
    silence_s = min(MAX_SILENCE_S, data.read_timeout)
    return _shard_cache(data.cache, int(data.cache_gb * 1e9), silence_s, data.retries)


@functools.lru_cache(maxsize=16)
def _shard_cache(folder: str | None, max_bytes: int, silence_s: float, retries: int) -> ShardCache:
    return ShardCache(folder, max_bytes, silence_s=silence_s, retries=retries)


def check_sources(
    recipe: Recipe, model: VideoModel, needs_latents: str | None = None, needs_pairs: str | None = None
) -> None:
    """Look for everything that `data.shards` and `data.video` need, without writing anything.

    Args:
        needs_latents: the setting by which shards of captions alone do not suffice, or None where they do.
        needs_pairs: the same for shards without pairs of noise and a teacher's sample.

    Raises:
        UserError: something is missing or unfit; the message names the key.
    """
    if recipe.data.video is not None:
        _video_shape(recipe, model)
    sources = shard_list(recipe.data.shards)
    for source in sources:
        held = _check_source(source, recipe, model)
        if needs_pairs is not None and not held.pairs:
            raise UserError(
                f"data.shards = '{redacted(source)}': {needs_pairs} needs pairs of noise and the teacher's sample, this"
                " holds none; make them with python launch/prepare.py pairs RECIPE OUT"
                f" data.shards={redacted(source)} and name OUT there, or change that key"
            )
        if needs_latents is not None and not held.latents:
            raise UserError(
                f"data.shards = '{redacted(source)}': {needs_latents} needs latents, this holds captions only; name"
                " shards with latents or change that key"
            )
    if not any(source.startswith((WORLD, PROMPTS)) for source in sources):  # these write one
        _check_negative_prompt(ShardIndex.open(sources, shard_cache(recipe)), recipe, model)


class _Kept(NamedTuple):
    """What all samples of a source have beside captions."""

    latents: bool
    pairs: bool


def _check_source(source: str, recipe: Recipe, model: VideoModel) -> _Kept:
    """Raise for what the source lacks."""
    if source.startswith((WORLD, PROMPTS)) and model.image_input is not None:
        raise UserError(
            f"data.shards = '{source}': this is an image-to-video model, and there are no images to begin with; make"
            " shards of videos with launch/prepare.py videos and this model's folder"
        )
    if source.startswith(WORLD):
        _check_latents(source, "the world", _world(source).latent_shape, model)
        _check_text_encoder(recipe, model)
        return _Kept(latents=True, pairs=False)
    if source.startswith(PROMPTS):
        captions_in(source.removeprefix(PROMPTS), f"data.shards = '{source}'")
        _check_text_encoder(recipe, model)
        if recipe.data.video is None:
            raise UserError(f"data.shards = '{source}': set data.video to num_frames, height and width of the videos")
        return _Kept(latents=False, pairs=False)
    index = ShardIndex.open(source, shard_cache(recipe))
    _check_fit(index, recipe, model)
    return _Kept(all(map(index.has_latents, index.buckets)), all(map(index.has_noise, index.buckets)))


def _materialize(source: str, recipe: Recipe, model: VideoModel) -> Path | str:
    if not source.startswith((WORLD, PROMPTS)):
        return source
    encoder_folder = text_encoder_folder(recipe, f"data.shards = {_shown(recipe.data.shards)}")
    if source.startswith(WORLD):
        world, dtype = _world(source), torch.float32
        facts = [source, WORLD_SAMPLES, WORLD_SEED, repr(world)]

        def write(to: Path, encoder: TextEncoder) -> None:
            write_world_shards(to, world, encoder, num_samples=WORLD_SAMPLES, seed=WORLD_SEED)
    else:
        captions, dtype = captions_in(source.removeprefix(PROMPTS), f"data.shards = '{source}'"), torch.bfloat16
        shape = _video_shape(recipe, model)
        facts = [source, captions, shape]

        def write(to: Path, encoder: TextEncoder) -> None:
            write_prompt_shards(to, captions, encoder, shape)

    facts += [content_digest(encoder_folder / part for part in TEXT_PARTS), repr(model.text_encoding)]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder = Path(recipe.run.dir) / "cache" / f"{source.partition(':')[0]}-{digest}"
    if (folder / "index.json").exists():
        return folder
    encoder = TextEncoder.from_pretrained(encoder_folder, dtype, encoding=model.text_encoding)
    aside = folder.with_name(f"{folder.name}.tmp")  # an interrupted attempt leaves it: begin anew
    if aside.exists():
        shutil.rmtree(aside)
    write(aside, encoder)
    if folder.exists():
        shutil.rmtree(folder)
    return aside.rename(folder)


def captions_of(recipe: Recipe) -> list[str]:
    """The captions of the world or prompts file that `data.shards` names.

    Raises:
        UserError: neither is there.
    """
    source = shard_list(recipe.data.shards)[0]
    if source.startswith(WORLD):
        return _world(source).captions()
    if source.startswith(PROMPTS):
        return captions_in(source.removeprefix(PROMPTS), f"data.shards = '{source}'")
    raise UserError(f"data.shards = '{redacted(source)}': name the captions with --prompts FILE, one per line")


def latent_shape_of(recipe: Recipe, model: VideoModel) -> LatentShape:
    """The latent shape (C, F, H, W) that the recipe's videos have: of `data.video`, the world, or the first shard."""
    source = shard_list(recipe.data.shards)[0]
    if recipe.data.video is not None:
        return _video_shape(recipe, model)
    if source.startswith(WORLD):
        return _world(source).latent_shape
    index = ShardIndex.open(source, shard_cache(recipe))
    return index.latent_shape(index.buckets[0])


def write_prompt_shards(folder: Path, captions: list[str], encoder: TextEncoder, latent_shape: LatentShape) -> None:
    """Write caption-only shards: embeddings and the latent shape that rollouts take."""
    embeds = encoder.encode(captions)
    bucket = "x".join(map(str, latent_shape))
    with ShardWriter(folder, latent_shape=latent_shape, bucket=bucket) as writer:
        for number, (caption, embed) in enumerate(zip(captions, embeds, strict=True)):
            writer.add(f"{number:08d}", embed.bfloat16(), caption, source="prompts")
    write_negative_prompt(folder, encoder.encode([NEGATIVE_PROMPT])[0].bfloat16())
    consolidate(folder)


def _world(source: str) -> World:
    name = source.removeprefix(WORLD)
    if name not in WORLDS:
        raise UserError(f"data.shards = '{source}': no such world; expected {WORLD}{' or '.join(WORLDS)}")
    return WORLDS[name]()


def captions_in(file: str, said: str) -> list[str]:
    """The lines of `file` that are not blank; `said` is how the user named it, for messages.

    Raises:
        UserError: there is no such file, or it is no text, or empty, or its ending says that it holds something else.
    """
    if (ending := Path(file).suffix.lower()) in _NO_CAPTIONS:
        raise UserError(f"{said}: a {ending} file is no list of captions; write a text file with one caption per line")
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{said}: no such file (working directory {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{said}: cannot be read as UTF-8 text ({error}); give a file with one caption per line"
        ) from None
    captions = [line for line in lines if line]
    if not captions:
        raise UserError(f"{said}: the file holds no captions; write one per line")
    return captions


def _check_text_encoder(recipe: Recipe, model: VideoModel) -> None:
    wanted_by = f"data.shards = {_shown(recipe.data.shards)}"
    known_encoding(model.text_encoding, wanted_by)
    text_encoder_folder(recipe, wanted_by)


def text_encoder_folder(recipe: Recipe, wanted_by: str) -> Path:
    """The folder of the recipe's text encoder.

    Raises:
        UserError: there is none; `wanted_by` says for what.
    """
    key, folder = "data.text_encoder", recipe.data.text_encoder
    if folder is None:
        key, folder = "model.pretrained", recipe.model.pretrained
    if folder is None or not all((Path(folder) / part).is_dir() for part in TEXT_PARTS):
        raise UserError(
            f"{key} = {folder!r}: {wanted_by} needs a text encoder; set"
            " data.text_encoder to a diffusers folder with text_encoder/ and tokenizer/"
        )
    return Path(folder)


def _video_shape(recipe: Recipe, model: VideoModel) -> LatentShape:
    video = recipe.data.video
    assert video is not None, "check_sources asks for data.video"
    return model.latent_shape(video.num_frames, video.height, video.width)


def _check_fit(index: ShardIndex, recipe: Recipe, model: VideoModel) -> None:
    if index.embed_dim != model.text_dim():
        raise UserError(
            f"data.shards = {_shown(recipe.data.shards)}: prompt embeddings are {index.embed_dim} wide, the model's"
            f" text_dim is {model.text_dim()}; prepare the shards with this model's text encoder"
        )
    for bucket in index.buckets:
        _check_latents(recipe.data.shards, f"bucket {bucket}", index.latent_shape(bucket), model)
        _check_image(recipe.data.shards, f"bucket {bucket}", index.held(bucket), model)


def _check_latents(shards: str | list[str], what: str, shape: LatentShape, model: VideoModel) -> None:
    smallest = model.smallest_latents()
    divides = all(size % unit == 0 for size, unit in zip(shape[1:], smallest[1:], strict=True))
    if shape[0] != smallest[0] or not divides:
        raise UserError(
            f"data.shards = {_shown(shards)}: {what} has latents {shape}; the model takes {smallest[0]} channels and"
            f" frames, height, width in multiples of {smallest[1:]}; use the model that the data are for, or other data"
        )


def _check_negative_prompt(index: ShardIndex, recipe: Recipe, model: VideoModel) -> None:
    """It stands for all prompts: an index does not say how long these are."""
    encoding, found = model.text_encoding, len(index.negative_prompt())
    if encoding is not None and encoding.keeps_padding and found != encoding.max_tokens:
        raise UserError(
            f"data.shards = {_shown(recipe.data.shards)}: the negative prompt has {found} embeddings, expected"
            f" {encoding.max_tokens}: the padding of prompts is a part of this network's sequence; prepare the shards"
            " with this model's folder"
        )


def _check_image(shards: str | list[str], what: str, held: Held, model: VideoModel) -> None:
    image = model.image_input
    if image is None:
        return
    said = f"data.shards = {_shown(shards)}: this is an image-to-video model and {what}"
    if not held.condition:
        raise UserError(
            f"{said} holds no images to begin with (condition_latents); make shards of videos with launch/prepare.py"
            " videos and this model's folder"
        )
    if image.embed_dim and held.image_embeds[1:] != (image.embed_dim,):
        found = f"image_embeds {list(held.image_embeds)}" if held.image_embeds else "no image_embeds"
        raise UserError(
            f"{said} has {found}, expected [N, {image.embed_dim}]; prepare the videos with this model's image encoder"
        )


def _shown(shards: str | list[str]) -> str:
    """`data.shards` for messages."""
    return repr(redacted(shards) if isinstance(shards, str) else [redacted(source) for source in shards])
