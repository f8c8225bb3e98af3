"""Shards: plain webdataset tars with an index beside them: their writer.

    <folder>/shard-000000.tar + shard-000000.index.json, ..., index.json, negative_prompt.safetensors

A sample is two tar members: `{key}.json` (caption, bucket, source, free extra fields) and `{key}.sample.safetensors`
(`latents` bf16 [C, F, H, W], absent in caption-only shards, and `prompt_embeds` bf16 [n_tokens, D] without padding;
in shards of pairs also `noise` bf16 [C, F, H, W], which a teacher's chain turned into `latents`; in shards for image to
video also `condition_latents` bf16 [C, F, H, W], see sgmd_dist/conditions.py, and perhaps `image_embeds` bf16 [N, E]).
A shard holds one bucket, that is one latent shape. Every file is written aside, fsynced and renamed, the index after
what it describes: whatever is visible is whole. To write a data set:

    with ShardWriter(folder, latent_shape=(16, 21, 60, 104), bucket="480p") as writer:
        writer.add("clip_000", prompt_embeds, "a red ball", latents=latents, source="clips/000.mp4")
    write_negative_prompt(folder, negative_embeds)
    index = consolidate(folder)
"""

from __future__ import annotations

import fcntl
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from webdataset.writer import TarWriter

from sgmd_dist.data.examine import member_bytes
from sgmd_dist.data.format import TENSORS_SUFFIX, VIDEO_TENSORS, check_key, safetensors_bytes
from sgmd_dist.data.members import Members, scan_tar, tar_members
from sgmd_dist.data.record import ShardRecord, sidecar_path
from sgmd_dist.durable import publish, write_durably
from sgmd_dist.errors import UserError

_RESERVED_JSON = ("bucket", "latent_shape", "crc32")
_END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)

PathLike = str | os.PathLike[str]


class ShardWriter:
    """Writes samples of one bucket into numbered shards of a folder; a context manager.

    The same samples give byte-equal files. A shard becomes visible when it is full or when the `with` block ends
    without an error; an error discards the shard in work and leaves the finished ones. Several buckets of one folder
    take a writer each, with prefixes of their own. Call `consolidate` once after the last writer.

    Args:
        folder: where to write; made if absent. A shard that exists already is a `UserError`, never overwritten.
        latent_shape: (C, F, H, W) of every sample.
        bucket: the name of this latent shape.
        prefix: of the file names.
        samples_per_shard: a shard is closed when it holds so many samples,
        max_bytes: or, if given, as soon as its tensors take so many bytes.
    """

    def __init__(
        self,
        folder: PathLike,
        *,
        latent_shape: Sequence[int],
        bucket: str,
        prefix: str = "shard",
        samples_per_shard: int = 1000,
        max_bytes: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.latent_shape = [int(size) for size in latent_shape]
        if len(self.latent_shape) != 4 or min(self.latent_shape) < 1:
            raise UserError(f"{folder}: latent_shape is {self.latent_shape}, expected four positive sizes (C, F, H, W)")
        if samples_per_shard < 1 or (max_bytes is not None and max_bytes < 1):
            raise UserError(f"{folder}: samples_per_shard={samples_per_shard}, max_bytes={max_bytes}: expected >= 1")
        self._bucket, self._prefix = bucket, prefix
        self._samples_per_shard, self._max_bytes = samples_per_shard, max_bytes
        self._seen: set[str] = set()
        self._num_shards = 0
        self._embed_dim: int | None = None  # known, like the next, from the first sample on
        self._stored: dict[str, tuple[int, ...]] | None = None  # shapes, of all tensors but the prompts'
        self._file: IO[bytes] | None = None
        self._tar: TarWriter | None = None
        self._path = self._temporary = self.folder
        self._rows: list[tuple[str, int, int]] = []  # key, size, crc32 of the shard in work
        self._num_bytes = 0  # of its tensors
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error}); choose another folder") from None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._discard()

    def add(
        self,
        key: str,
        prompt_embeds: Tensor,
        caption: str,
        *,
        latents: Tensor | None = None,
        noise: Tensor | None = None,
        condition_latents: Tensor | None = None,
        image_embeds: Tensor | None = None,
        source: str = "",
        **extra_json: Any,
    ) -> None:
        """Append a sample.

        Args:
            key: its name: unique, 1 to 80 ASCII characters without '.', '/', '\\' and spaces.
            prompt_embeds: `[n_tokens, D]` of the valid text tokens only; stored as bf16.
            caption: the text behind `prompt_embeds`.
            latents: `[C, F, H, W]`, stored as bf16; given for all samples of a writer or for none.
            noise: `[C, F, H, W]` beside `latents`, likewise.
            condition_latents: `[C, F, H, W]` of the image that the video begins with, likewise.
            image_embeds: `[N, E]` of that image beside `condition_latents`, likewise; all of one shape.
            source: where the sample comes from.
            extra_json: further fields of the sample's json.

        Raises `UserError` for a wrong key, shape or dtype, and values that are not finite.
        """
        optional = {
            "latents": latents,
            "noise": noise,
            "condition_latents": condition_latents,
            "image_embeds": image_embeds,
        }
        stored = {name: tensor for name, tensor in optional.items() if tensor is not None}
        data = safetensors_bytes(self._checked(key, prompt_embeds, stored, extra_json))
        crc32 = zlib.crc32(data)
        description = {"caption": caption, "bucket": self._bucket, "source": source, "crc32": crc32, **extra_json}
        if latents is None:
            description["latent_shape"] = self.latent_shape
        try:
            description_bytes = json.dumps(description, ensure_ascii=False, sort_keys=True).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.folder}: key '{key}': json fields cannot be stored: {error}") from error
        if self._tar is None:
            self._begin_shard()
        assert self._tar is not None
        self._tar.write({"__key__": key, "json": description_bytes, TENSORS_SUFFIX: data})
        self._seen.add(key)
        self._rows.append((key, len(data), crc32))
        self._num_bytes += len(data)
        if len(self._rows) >= self._samples_per_shard or (self._max_bytes and self._num_bytes >= self._max_bytes):
            self._finish_shard()

    def close(self) -> None:
        """Make the shard in work visible, if there is one."""
        if self._tar is not None:
            self._finish_shard()

    def _checked(
        self,
        key: str,
        prompt_embeds: Tensor,
        stored: dict[str, Tensor],
        extra_json: dict[str, Any],
    ) -> dict[str, Tensor]:
        """The sample's tensors as they are stored; nothing is written of a sample that fails."""
        where = f"{self.folder}: key '{key}'"
        check_key(key, self.folder)
        if key in self._seen:
            raise UserError(f"{where} was added before; give every sample its own key")
        if reserved := [name for name in _RESERVED_JSON if name in extra_json]:
            raise UserError(f"{where}: json field '{reserved[0]}' is written by the writer itself; rename yours")
        if prompt_embeds.ndim != 2 or 0 in prompt_embeds.shape:
            raise UserError(f"{where}: prompt_embeds is {list(prompt_embeds.shape)}, expected [n_tokens, D]")
        if self._embed_dim not in (None, prompt_embeds.shape[1]):
            raise UserError(f"{where}: prompt_embeds has D={prompt_embeds.shape[1]}, samples before {self._embed_dim}")
        self._check_stored(where, stored)
        tensors = {"prompt_embeds": prompt_embeds} | stored
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{where}: {name} ({tensor.dtype}) must be floating point and finite; mend the encoder")
        self._embed_dim = prompt_embeds.shape[1]
        self._stored = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        return {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in tensors.items()}

    def _check_stored(self, where: str, stored: dict[str, Tensor]) -> None:
        """Raise for tensors beside the prompt that are not of this writer's kind."""
        if "noise" in stored and "latents" not in stored:
            raise UserError(f"{where}: noise belongs to the latents that were made of it; give both, or neither")
        if "image_embeds" in stored and "condition_latents" not in stored:
            raise UserError(f"{where}: image_embeds belong to an image's condition_latents; give both, or the latter")
        for name in (*VIDEO_TENSORS, "image_embeds"):
            if name in VIDEO_TENSORS and name in stored and list(stored[name].shape) != self.latent_shape:
                raise UserError(
                    f"{where}: {name} are {list(stored[name].shape)}, bucket '{self._bucket}' takes "
                    f"{self.latent_shape}; give another latent shape its own bucket and writer"
                )
            if self._stored is not None and (name in stored) != (name in self._stored):
                raise UserError(f"{where}: {name} must be given for all samples of a writer or for none")
        if "image_embeds" in stored:
            shape, before = tuple(stored["image_embeds"].shape), (self._stored or {}).get("image_embeds")
            if len(shape) != 2 or 0 in shape or before not in (None, shape):
                expected = "[N, E]" if before is None else f"{list(before)} as in the samples before"
                raise UserError(f"{where}: image_embeds are {list(shape)}, expected {expected}")

    def _begin_shard(self) -> None:
        self._path = self.folder / f"{self._prefix}-{self._num_shards:06d}.tar"
        for path in (self._path, sidecar_path(self._path)):
            if path.exists():
                raise UserError(f"{path}: exists already; write into an empty folder or choose another prefix")
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by _finish_shard or _discard
        fcntl.flock(self._file, fcntl.LOCK_EX)  # for `salvage`, and as long as this process lives
        # A constant mtime: two runs over the same samples write the same bytes. A float would cost every member an
        # extended header of 1 KB.
        self._tar = TarWriter(self._file, encoder=False, mtime=0)

    def _finish_shard(self) -> None:
        assert self._tar is not None and self._file is not None
        self._tar.close()
        self._tar = None
        self._file.flush()
        with open(self._temporary, "rb") as written:
            members = tar_members(self._temporary, written)
        num_bytes = self._temporary.stat().st_size
        publish(self._file, self._temporary, self._path)
        stored = self._stored or {}
        keys, sizes, crc32 = (list(column) for column in zip(*self._rows, strict=True))
        record = ShardRecord(
            shard=self._path.name,
            tar_bytes=num_bytes,
            bucket=self._bucket,
            latent_shape=self.latent_shape,
            has_latents="latents" in stored,
            embed_dim=self._embed_dim or 0,
            keys=keys,
            offsets=[members[key][TENSORS_SUFFIX].offset_data for key in keys],
            sizes=sizes,
            crc32=crc32,
            has_noise="noise" in stored,
            has_condition="condition_latents" in stored,
            image_embeds=list(stored.get("image_embeds", ())),
        )
        write_durably(sidecar_path(self._path), json.dumps(record.to_json()).encode())
        self._file, self._rows, self._num_bytes, self._num_shards = None, [], 0, self._num_shards + 1

    def _discard(self) -> None:
        with suppress(OSError, ValueError):  # a full disk fails again here; the file goes in any case
            if self._tar is not None:
                self._tar.close()
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
        self._tar, self._rows = None, []


def salvage(temporary: Path) -> Path | None:
    """Give the shard that a killed `ShardWriter` left under its temporary name its end and its own name.

    It ends after the last of the samples that are whole, by the crc32 in their json. Its index is not written.

    Returns:
        The shard, or None where it had no whole sample: it is removed then.

    Raises:
        UserError: a living process writes it.
    """
    with open(temporary, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{temporary}: another process writes this shard; wait for it, or stop it") from None
        end = 0
        for members in scan_tar(temporary, file).samples.values():
            if not _is_whole(file, members):
                break
            end = file.seek(-(-file.tell() // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if end == 0:
            temporary.unlink()
            return None
        file.truncate(end)
        file.seek(end)
        file.write(_END_OF_TAR)
        final = temporary.with_suffix("")
        publish(file, temporary, final)
        return final


def _is_whole(file: BufferedRandom, members: Members) -> bool:
    """Whether both members of a sample are what was written; leaves `file` behind them."""
    if members.keys() != {"json", TENSORS_SUFFIX}:
        return False
    description, data = (member_bytes(file, members[name]) for name in ("json", TENSORS_SUFFIX))
    try:
        return json.loads(description)["crc32"] == zlib.crc32(data)
    except (ValueError, KeyError, TypeError):
        return False
