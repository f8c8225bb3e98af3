"""What makes samples of rows: videos with their captions through VAE and text encoder, or captions alone."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sgmd_dist.autoencoder import Autoencoder
from sgmd_dist.data.encode import NEGATIVE_PROMPT, TextEncoder
from sgmd_dist.data.image_encoder import IMAGE_PARTS, ImageEncoder
from sgmd_dist.data.manifest import Manifest, Row
from sgmd_dist.data.preparation import Sample, Skipped
from sgmd_dist.data.video import Bucket, Clip, UnreadableVideo, count_frames, nearest_bucket, probe, read_clip
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import TEXT_ENCODING, ImageInput, LatentShape, TextEncoding, VideoModel
from sgmd_dist.registry import MODELS, available, load

_READ_AHEAD = 2  # decoded videos that wait; one of 81 x 480 x 832 takes 97 MB

T = TypeVar("T")
U = TypeVar("U")


class VideoRows:
    """Encodes rows with videos. A thread reads the next videos while the networks work.

    Samples for an image-to-video model get what it sees of a video's first picture.

    Args:
        buckets: at least one.
        frames_per_second: of the samples.
        captions_at_once: of a text encoder's batch.
        with_images: whether the samples are for an image-to-video model,
        image_encoder: and if it takes embeddings of the image, their encoder.

    Raises:
        UserError: a bucket is not what the VAE takes.
    """

    def __init__(
        self,
        manifest: Manifest,
        text_encoder: TextEncoder,
        autoencoder: Autoencoder,
        buckets: Sequence[Bucket],
        *,
        frames_per_second: Fraction,
        negative_prompt: str,
        captions_at_once: int,
        with_images: bool = False,
        image_encoder: ImageEncoder | None = None,
    ) -> None:
        self._with_images, self._image_encoder = with_images, image_encoder
        self._manifest, self._buckets = manifest, list(buckets)
        self._text_encoder, self._autoencoder = text_encoder, autoencoder
        self._frames_per_second = frames_per_second
        self._negative_prompt, self._captions_at_once = negative_prompt, captions_at_once
        self._latent_shapes = {bucket: _latent_shape(autoencoder, bucket) for bucket in buckets}

    @classmethod
    def load(
        cls,
        manifest: Manifest,
        pretrained: Path,
        buckets: Sequence[Bucket],
        *,
        frames_per_second: Fraction,
        negative_prompt: str = NEGATIVE_PROMPT,
        captions_at_once: int = 16,
        device: torch.device | str = "cpu",
        text_dtype: torch.dtype = torch.bfloat16,
        vae_dtype: torch.dtype = torch.float32,
        max_tokens: int | None = None,
    ) -> VideoRows:
        """With the networks of a diffusers folder.

        Raises:
            UserError: a part of the folder is missing or damaged, or a bucket is not what its VAE and, if it has one,
                its transformer take.
        """
        autoencoder = Autoencoder.load(pretrained / "vae", device, vae_dtype)
        image = _check_transformer(pretrained, {bucket: _latent_shape(autoencoder, bucket) for bucket in buckets})
        text_encoder = TextEncoder.from_pretrained(
            pretrained, text_dtype, device=device, max_tokens=max_tokens, encoding=text_encoding_of(pretrained)
        )
        return cls(
            manifest,
            text_encoder,
            autoencoder,
            buckets,
            frames_per_second=frames_per_second,
            negative_prompt=negative_prompt,
            captions_at_once=captions_at_once,
            with_images=image is not None,
            image_encoder=ImageEncoder.of_input(pretrained, image, device) if image is not None else None,
        )

    def negative_embeds(self) -> Tensor:
        return self._text_encoder.encode([self._negative_prompt])[0]

    def encode(self, rows: Sequence[Row]) -> Generator[tuple[Row, Sample | Skipped], None, None]:
        read = _ahead(self._read, rows, _READ_AHEAD)
        try:
            for some in _pieces(rows, self._captions_at_once):
                embeds = self._text_encoder.encode([row.caption or "" for row in some], self._captions_at_once)
                for row, embed in zip(some, embeds, strict=True):
                    yield row, self._sample(row, embed, next(read))
        finally:
            read.close()

    def _read(self, row: Row) -> tuple[Clip, Bucket, Tensor] | Skipped:
        if row.caption is None:
            return Skipped("no caption: there is no text file of its name beside it")
        path = self._manifest.path(row)
        longest = max(bucket.num_frames for bucket in self._buckets)
        try:
            clip = probe(path, longest / self._frames_per_second)
            num_frames = count_frames(clip.duration, self._frames_per_second)
            bucket = nearest_bucket(self._buckets, num_frames, clip.height, clip.width)
            if bucket is None:
                shortest = min(bucket.num_frames for bucket in self._buckets)
                return Skipped(
                    f"too short: {num_frames} frames at {float(self._frames_per_second):g} per second, the shortest"
                    f" bucket has {shortest}"
                )
            return clip, bucket, read_clip(path, clip, self._frames_per_second, bucket)
        except UnreadableVideo as error:
            return Skipped(f"unreadable: {error}")

    def _sample(self, row: Row, embeds: Tensor, read: tuple[Clip, Bucket, Tensor] | Skipped) -> Sample | Skipped:
        if isinstance(read, Skipped):
            return read
        clip, bucket, pictures = read
        latents, expected = self._autoencoder.encode(pictures), self._latent_shapes[bucket]
        if tuple(latents.shape) != expected:
            raise RuntimeError(f"bucket {bucket.name}: the VAE made {tuple(latents.shape)}, its config says {expected}")
        image = self._image(pictures)
        for name, tensor in {"latents": latents, **image}.items():
            if not bool(torch.isfinite(tensor).all()):
                return Skipped(f"its {name} are not finite")
        extra = {
            "fps": float(self._frames_per_second),
            "source_fps": clip.frames_per_second,
            "source_size": list(clip.stored),
        }
        return Sample(embeds, latents, expected, bucket.name, row.video or "", extra, **image)

    def _image(self, pictures: Tensor) -> dict[str, Tensor]:
        """What an image-to-video model sees of the first of `pictures`, by the names of a sample's tensors."""
        if not self._with_images:
            return {}
        found = {"condition_latents": self._autoencoder.encode_first(pictures)}
        if self._image_encoder is not None:
            found["image_embeds"] = self._image_encoder.encode(pictures[0])
        return found


class CaptionRows:
    """Encodes rows with captions alone, for one latent shape that rollouts take."""

    def __init__(
        self, text_encoder: TextEncoder, latent_shape: LatentShape, *, negative_prompt: str, captions_at_once: int
    ) -> None:
        self._text_encoder, self._latent_shape = text_encoder, latent_shape
        self._negative_prompt, self._captions_at_once = negative_prompt, captions_at_once

    def negative_embeds(self) -> Tensor:
        return self._text_encoder.encode([self._negative_prompt])[0]

    def encode(self, rows: Sequence[Row]) -> Generator[tuple[Row, Sample | Skipped], None, None]:
        bucket = "x".join(map(str, self._latent_shape))
        for some in _pieces(rows, self._captions_at_once):
            embeds = self._text_encoder.encode([row.caption or "" for row in some], self._captions_at_once)
            for row, embed in zip(some, embeds, strict=True):
                yield row, Sample(embed, None, self._latent_shape, bucket, "prompts")


def _latent_shape(autoencoder: Autoencoder, bucket: Bucket) -> LatentShape:
    try:
        return autoencoder.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    except UserError as error:
        raise UserError(f"--buckets: {bucket.name}: {error}") from None


def transformer_latents(pretrained: Path, video: Bucket, said: str) -> LatentShape:
    """(C, F, H, W) of the latents that a diffusers folder's transformer has for videos like `video`.

    Raises:
        UserError: the folder has no transformer of a family here, it takes no such videos, or captions alone do not
            suffice; the message begins with `said`.
    """
    model = _transformer(pretrained)
    if model.image_input is not None:
        raise UserError(
            f"--pretrained {pretrained}: this is an image-to-video model, which needs images beside captions; make its"
            " shards with launch/prepare.py videos"
        )
    try:
        return model.latent_shape(video.num_frames, video.height, video.width)
    except UserError as error:
        raise UserError(f"{said}: {error}") from None


def _check_transformer(pretrained: Path, latent_shapes: dict[Bucket, LatentShape]) -> ImageInput | None:
    """What the folder's transformer, if it has one, takes of an image; `UserError` where it does not take a bucket's
    latents."""
    if not (pretrained / "transformer").is_dir():
        return None
    model = _transformer(pretrained)
    channels, *patch = model.smallest_latents()
    for bucket, shape in latent_shapes.items():
        if shape[0] != channels or any(size % unit for size, unit in zip(shape[1:], patch, strict=True)):
            raise UserError(
                f"--buckets: {bucket.name}: its latents are {shape}; {pretrained / 'transformer'} takes {channels}"
                f" channels and frames, height, width in multiples of {tuple(patch)}; choose other sizes"
            )
    return model.image_input


def image_settings(pretrained: Path) -> dict[str, Any]:
    """What decides on the images of samples for an image-to-video folder; nothing for another.

    Raises:
        UserError: the folder's transformer cannot be read.
    """
    if _check_transformer(pretrained, {}) is None:
        return {}
    return {"image_sha256": pretrained_fingerprint(pretrained, IMAGE_PARTS)}


def text_settings(pretrained: Path) -> dict[str, Any]:
    """What decides on prompt embeddings beside the text encoder itself; nothing for Wan's way.

    Raises:
        UserError: the folder's transformer cannot be read.
    """
    encoding = text_encoding_of(pretrained)
    return {} if encoding == TEXT_ENCODING else {"text_encoding": repr(encoding)}


def text_encoding_of(pretrained: Path) -> TextEncoding | None:
    """How the pipeline of a diffusers folder makes prompt embeddings, by its transformer."""
    return _transformer(pretrained).text_encoding if (pretrained / "transformer").is_dir() else TEXT_ENCODING


def _transformer(pretrained: Path) -> VideoModel:
    """The model of a diffusers folder, of the family whose network its config.json names."""
    families = {name: load(MODELS, name) for name in available(MODELS)}
    config = pretrained / "transformer" / "config.json"
    try:
        network = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--pretrained {pretrained}: {config} names no network ({error}); download it again") from None
    for name, family in families.items():
        if family.NETWORK.__name__ == network:
            return family.build(family.Section(family=name), str(pretrained), "--pretrained")
    known = ", ".join(family.NETWORK.__name__ for family in families.values())
    raise UserError(f"--pretrained {pretrained}: {config} describes {network}, expected one of {known}")


def fingerprint(rows: Iterable[Row]) -> str:
    """sha256 of the rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.number, row.video, row.caption, row.split]).encode() + b"\n")
    return digest.hexdigest()


def pretrained_fingerprint(folder: Path, parts: Sequence[str]) -> str:
    """sha256 of a diffusers folder's `parts`: their JSON files, and the names and sizes of the others.

    Stays the same where the folder is moved or copied, and needs no reading of weights.
    """
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
            content: Any = path.read_bytes() if path.suffix == ".json" else str(path.stat().st_size).encode()
            digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + content + b"\n")
    return digest.hexdigest()


def _pieces(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _ahead(function: Callable[[T], U], items: Iterable[T], depth: int) -> Generator[U, None, None]:
    """`function` of each item, in order, computed in a thread up to `depth` items before they are asked for."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
