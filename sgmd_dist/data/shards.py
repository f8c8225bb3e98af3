"""Shards: plain webdataset tars with an index beside them: their writer, and the index that readers open.

    <folder>/shard-000000.tar + shard-000000.index.json, ..., index.json, negative_prompt.safetensors

A sample is two tar members: `{key}.json` (caption, bucket, source, free extra fields) and `{key}.sample.safetensors`
(`latents` bf16 [C, F, H, W], absent in caption-only shards, and `prompt_embeds` bf16 [n_tokens, D] without padding).
A shard holds one bucket, that is one latent shape. Every file is written aside, fsynced and renamed, the index after
what it describes: whatever is visible is whole. To write a data set:

    with ShardWriter(folder, latent_shape=(16, 21, 60, 104), bucket="480p") as writer:
        writer.add("clip_000", prompt_embeds, "a red ball", latents=latents, source="clips/000.mp4")
    write_negative_prompt(folder, negative_embeds)
    index = consolidate(folder)
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import braceexpand
import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor
from webdataset.writer import TarWriter

from sgmd_dist.data.format import (
    INDEX_VERSION,
    NEGATIVE_PROMPT_NAME,
    TENSORS_SUFFIX,
    CorruptSample,
    ShardRecord,
    build_index,
    check_key,
    consolidate_call,
    list_tars,
    parse_safetensors,
    read_json,
    read_negative_prompt,
    sidecar_path,
    sidecar_record,
    tar_members,
    write_negative_prompt,
)
from sgmd_dist.durable import publish, write_durably
from sgmd_dist.errors import UserError

__all__ = [
    "CorruptSample",
    "ShardIndex",
    "ShardRecord",
    "ShardWriter",
    "build_index",
    "consolidate",
    "parse_safetensors",
    "read_negative_prompt",
    "write_negative_prompt",
]

INDEX_NAME = "index.json"
_RESERVED_JSON = ("bucket", "latent_shape")

LatentShape = tuple[int, int, int, int]
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
        self._has_latents: bool | None = None
        self._file: IO[bytes] | None = None
        self._tar: TarWriter | None = None
        self._path = self._temporary = self.folder
        self._rows: list[tuple[str, int, int]] = []  # key, size, crc32 of the shard in work
        self.folder.mkdir(parents=True, exist_ok=True)

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
        source: str = "",
        **extra_json: Any,
    ) -> None:
        """Append a sample.

        Args:
            key: its name: unique, 1 to 80 ASCII characters without '.', '/', '\\' and spaces.
            prompt_embeds: `[n_tokens, D]` of the valid text tokens only; stored as bf16.
            caption: the text behind `prompt_embeds`.
            latents: `[C, F, H, W]`, stored as bf16; given for all samples of a writer or for none.
            source: where the sample comes from.
            extra_json: further fields of the sample's json.

        Raises `UserError` for a wrong key, shape or dtype, and values that are not finite.
        """
        tensors = self._checked(key, prompt_embeds, latents, extra_json)
        description = {"caption": caption, "bucket": self._bucket, "source": source, **extra_json}
        if latents is None:
            description["latent_shape"] = self.latent_shape
        try:
            description_bytes = json.dumps(description, ensure_ascii=False, sort_keys=True).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.folder}: key '{key}': json fields cannot be stored: {error}") from error
        data = save_safetensors(tensors)
        if self._tar is None:
            self._begin_shard()
        assert self._tar is not None
        self._tar.write({"__key__": key, "json": description_bytes, TENSORS_SUFFIX: data})
        self._seen.add(key)
        self._rows.append((key, len(data), zlib.crc32(data)))
        num_bytes = sum(size for _, size, _ in self._rows)
        if len(self._rows) >= self._samples_per_shard or (self._max_bytes and num_bytes >= self._max_bytes):
            self._finish_shard()

    def close(self) -> None:
        """Make the shard in work visible, if there is one."""
        if self._tar is not None:
            self._finish_shard()

    def _checked(
        self, key: str, prompt_embeds: Tensor, latents: Tensor | None, extra_json: dict[str, Any]
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
        if latents is not None and list(latents.shape) != self.latent_shape:
            raise UserError(
                f"{where}: latents are {list(latents.shape)}, bucket '{self._bucket}' takes {self.latent_shape}; "
                "give another latent shape its own bucket and writer"
            )
        if self._has_latents not in (None, latents is not None):
            raise UserError(f"{where}: latents must be given for all samples of a writer or for none")
        tensors = {"prompt_embeds": prompt_embeds} | ({} if latents is None else {"latents": latents})
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{where}: {name} ({tensor.dtype}) must be floating point and finite; mend the encoder")
        self._embed_dim, self._has_latents = prompt_embeds.shape[1], latents is not None
        return {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in tensors.items()}

    def _begin_shard(self) -> None:
        self._path = self.folder / f"{self._prefix}-{self._num_shards:06d}.tar"
        for path in (self._path, sidecar_path(self._path)):
            if path.exists():
                raise UserError(f"{path}: exists already; write into an empty folder or choose another prefix")
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by _finish_shard or _discard
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
        keys, sizes, crc32 = (list(column) for column in zip(*self._rows, strict=True))
        record = ShardRecord(
            shard=self._path.name,
            tar_bytes=num_bytes,
            bucket=self._bucket,
            latent_shape=self.latent_shape,
            has_latents=bool(self._has_latents),
            embed_dim=self._embed_dim or 0,
            keys=keys,
            offsets=[members[key][TENSORS_SUFFIX].offset_data for key in keys],
            sizes=sizes,
            crc32=crc32,
        )
        write_durably(sidecar_path(self._path), json.dumps(record.to_json()).encode())
        self._file, self._rows, self._num_shards = None, [], self._num_shards + 1

    def _discard(self) -> None:
        with suppress(OSError, ValueError):  # a full disk fails again here; the file goes in any case
            if self._tar is not None:
                self._tar.close()
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
        self._tar, self._rows = None, []


def consolidate(folder: PathLike) -> ShardIndex:
    """Write `index.json` from the sidecars of all tars of `folder`, in the order of their names, and open it.

    A tar without a sidecar is read and gets one (`build_index`). Raises `UserError` for a folder without tars, a tar
    whose size differs from its sidecar's, and a key that occurs twice.
    """
    folder = Path(folder)
    records: list[ShardRecord] = []
    shard_of_key: dict[str, str] = {}
    for tar_path in list_tars(folder):
        sidecar = sidecar_path(tar_path)
        if not sidecar.exists():
            write_durably(sidecar, json.dumps(build_index(tar_path).to_json()).encode())
        record = sidecar_record(tar_path)
        for key in record.keys:
            if key in shard_of_key:
                raise UserError(f"{tar_path}: key '{key}' is in {shard_of_key[key]} too; give every sample its own key")
            shard_of_key[key] = tar_path.name
        records.append(record)
    index = {"version": INDEX_VERSION, "shards": [record.to_json() for record in records]}
    write_durably(folder / INDEX_NAME, json.dumps(index).encode())
    return ShardIndex.open(os.fspath(folder))


def _folder_records(folder: Path) -> list[tuple[Path, ShardRecord]]:
    path = folder / INDEX_NAME
    tars = {tar.name for tar in list_tars(folder)}
    content = read_json(path, consolidate_call(folder))
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list):
        raise UserError(f"{path}: holds no list 'shards'; delete it and {consolidate_call(folder)}")
    records = [ShardRecord.from_json(value, path) for value in shards]
    if unlisted := sorted(tars - {record.shard for record in records}):
        raise UserError(f"{folder / unlisted[0]}: not listed in {INDEX_NAME}, which is old; {consolidate_call(folder)}")
    for record in records:
        record.check_tar(folder / record.shard)
    return [(folder / record.shard, record) for record in records]


def _expand(entry: str) -> list[tuple[Path, ShardRecord]]:
    """The shards that one entry of data.shards stands for."""
    if "://" in entry or entry.startswith("pipe:"):
        raise UserError(f"data.shards: '{entry}': only local folders and tars can be read; copy the shards to a disk")
    if not entry.endswith(".tar") and "{" not in entry:
        return _folder_records(Path(entry))
    paths = [Path(path) for path in braceexpand.braceexpand(entry)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such shard; check data.shards '{entry}'")
    return [(path, sidecar_record(path)) for path in paths]


class ShardIndex:
    """All samples of a data set, in the order of its shards. Open it with `ShardIndex.open`.

    Attributes, with N samples and S shards:
        paths: the S tars.
        keys: N names.
        shard, offset, size, crc32, bucket: numpy arrays of N integers: the sample's shard number, its safetensors
            member's first byte in the tar, its bytes, their crc32, and the number of its bucket in `buckets`.
        buckets: bucket names in order of first appearance.
        embed_dim: D of every prompt embedding.
        folder: of the first shard.
    """

    def __init__(self, shards: Sequence[tuple[Path, ShardRecord]]) -> None:
        records = [record for _, record in shards]
        self.paths = [path for path, _ in shards]
        self.folder = self.paths[0].parent
        self._records = records
        self._kinds: dict[str, tuple[list[int], bool]] = {}
        for path, record in shards:
            self._check_kind(path, record)
        self.buckets = list(self._kinds)
        self.embed_dim = records[0].embed_dim
        counts = [len(record.keys) for record in records]
        number = {name: i for i, name in enumerate(self.buckets)}
        self.keys = [key for record in records for key in record.keys]
        self.shard = np.repeat(np.arange(len(records), dtype=np.int64), counts)
        self.bucket = np.repeat(np.array([number[record.bucket] for record in records], dtype=np.int64), counts)
        self.offset = np.array([value for record in records for value in record.offsets], dtype=np.int64)
        self.size = np.array([value for record in records for value in record.sizes], dtype=np.int64)
        self.crc32 = np.array([value for record in records for value in record.crc32], dtype=np.uint32)

    def _check_kind(self, path: Path, record: ShardRecord) -> None:
        first = self._records[0]
        if record.embed_dim != first.embed_dim:
            raise UserError(
                f"{path}: prompt_embeds have D={record.embed_dim}, {self.paths[0]} has D={first.embed_dim}; "
                "encode all shards with one text encoder"
            )
        kind = (list(record.latent_shape), record.has_latents)
        known = self._kinds.setdefault(record.bucket, kind)
        if known != kind:
            raise UserError(
                f"{path}: bucket '{record.bucket}' has latent shape {kind[0]} (latents stored: {kind[1]}), the shards "
                f"before {known[0]} (latents stored: {known[1]}); give every kind of shard its own bucket name"
            )

    @classmethod
    def open(cls, shards: PathLike | Sequence[PathLike]) -> ShardIndex:
        """Open a folder, a path or brace pattern of tars, or a list of those, concatenated in order.

        Reads indexes and file sizes only. Raises `UserError` for what is missing, not indexed or of another size.
        """
        entries = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
        found = [shard for entry in entries for shard in _expand(os.fspath(entry))]
        if not found:
            raise UserError("data.shards: names no shard; give a folder, a pattern of tars, or a list of those")
        return cls(found)

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    def latent_shape(self, bucket: int | str) -> LatentShape:
        """(C, F, H, W) of a bucket, given by its name or number."""
        c, f, h, w = self._kinds[self.buckets[bucket] if isinstance(bucket, int) else bucket][0]
        return c, f, h, w

    def has_latents(self, bucket: int | str) -> bool:
        """Whether the samples of a bucket hold latents, not captions only."""
        return self._kinds[self.buckets[bucket] if isinstance(bucket, int) else bucket][1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what training sees, in order: buckets, latent shapes, keys, sizes, crc32; not of paths."""
        digest = hashlib.sha256()
        for record in self._records:
            content = {k: v for k, v in record.to_json().items() if k not in ("shard", "tar_bytes", "offsets")}
            digest.update(json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def negative_prompt(self) -> Tensor:
        """The data set's negative prompt embedding, `[n_tokens, D]` bf16, the same in every folder of the list."""
        folders = list(dict.fromkeys(path.parent for path in self.paths))
        first = read_negative_prompt(folders[0])
        if first.shape[1] != self.embed_dim:
            raise UserError(
                f"{folders[0] / NEGATIVE_PROMPT_NAME}: D={first.shape[1]}, the shards have D={self.embed_dim}; "
                "encode it with the shards' text encoder"
            )
        for folder in folders[1:]:
            if not torch.equal(read_negative_prompt(folder), first):
                raise UserError(f"{folder / NEGATIVE_PROMPT_NAME}: differs from {folders[0]}'s; use one for all")
        return first
