"""The index of a data set: all its samples in the order of their shards, opened without reading a tar.

Shards may lie elsewhere (sgmd_dist/data/remote.py): they come into the node cache when they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgmd_dist.data.cache import ShardCache, Wanted
from sgmd_dist.data.examine import build_index
from sgmd_dist.data.foreign import OWN_LAYOUT, ForeignPlace
from sgmd_dist.data.format import (
    NEGATIVE_PROMPT_NAME,
    consolidate_call,
    parse_negative_prompt,
    read_json,
    read_negative_prompt,
)
from sgmd_dist.data.members import Mistake
from sgmd_dist.data.record import INDEX_VERSION, Held, ShardRecord, list_tars, sidecar_path, sidecar_record
from sgmd_dist.data.remote import Remote, is_remote, local_path_of
from sgmd_dist.data.remote_index import INDEX_NAME, expanded, open_remote, read_remote_prompt
from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape

_PLACES = ("shard", "tar_bytes", "offsets", "embed_offsets")

PathLike = str | os.PathLike[str]


def consolidate(
    folder: PathLike, *, num_threads: int = 1, on_indexed: Callable[[Path], None] | None = None
) -> ShardIndex:
    """Write `index.json` from the sidecars of all tars of `folder`, in the order of their names, and open it.

    A tar without a sidecar is read and gets one (`build_index`), `num_threads` at a time; `on_indexed` is called with
    each tar that has one. Raises `UserError` for a folder without tars, a tar that cannot be indexed or whose size
    differs from its sidecar's, and a sample that occurs twice. Sidecars that were written before stay.
    """
    folder = Path(folder)
    records = write_sidecars(list_tars(folder), num_threads=num_threads, on_indexed=on_indexed)
    if twice := find_duplicates([(folder / record.shard, record) for record in records]):
        raise UserError(str(twice[0]))
    index = {"version": INDEX_VERSION, "shards": [record.to_json() for record in records]}
    write_durably(folder / INDEX_NAME, json.dumps(index).encode())
    return ShardIndex.open(os.fspath(folder))


def write_sidecars(
    tars: Sequence[Path], *, num_threads: int = 1, on_indexed: Callable[[Path], None] | None = None
) -> list[ShardRecord]:
    """The records of `tars`; one without a sidecar is read whole and gets one. Raises `UserError` as `build_index`."""

    def record(tar_path: Path) -> ShardRecord:
        sidecar = sidecar_path(tar_path)
        if not sidecar.exists():
            write_durably(sidecar, json.dumps(build_index(tar_path).to_json()).encode())
        found = sidecar_record(tar_path)
        if on_indexed is not None:
            on_indexed(tar_path)
        return found

    threads = ThreadPoolExecutor(num_threads)
    try:
        return list(threads.map(record, tars))
    finally:
        threads.shutdown(cancel_futures=True)


def find_duplicates(shards: Sequence[tuple[Path, ShardRecord]]) -> list[Mistake]:
    """Samples that occur twice in a data set.

    A key names one sample. Writers of foreign shards begin with the same key in every shard: there only a key with
    the same bytes is a sample that occurs twice.
    """
    seen: dict[str | tuple[str, int], Path] = {}
    mistakes = []
    for path, record in shards:
        own = record.layout == OWN_LAYOUT
        for key, offset, crc32 in zip(record.keys, record.offsets, record.crc32, strict=True):
            name = key if own else (key, crc32)
            if name in seen:
                what = f"its key is in {seen[name].name} too; give every sample its own key"
                mistakes.append(Mistake(path, what, key, offset))
            seen.setdefault(name, path)
    return mistakes


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


def _expand(entry: str, cache: ShardCache) -> Sequence[tuple[Path | Remote, ShardRecord]]:
    """The shards that one entry of data.shards stands for."""
    entry = local_path_of(entry)
    if is_remote(entry):
        return open_remote(entry, cache)
    if not entry.endswith(".tar") and "{" not in entry:
        return _folder_records(Path(entry))
    paths = [Path(path) for path in expanded(entry)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such shard; check data.shards '{entry}'")
    return [(path, sidecar_record(path)) for path in paths]


class ShardIndex:
    """All samples of a data set, in the order of its shards. Open it with `ShardIndex.open`.

    Attributes, with N samples and S shards:
        paths: where the S tars lie, as text without secrets: `Path`s, and `Remote`s of those that lie elsewhere. To
            read a tar ask for its `local_path` or `open_shard`.
        keys: N names.
        shard, offset, size, crc32, bucket: numpy arrays of N integers: the sample's shard number, its safetensors
            member's first byte in the tar, its bytes, their crc32, and the number of its bucket in `buckets`.
        entry: numpy array of S integers, the number of the entry of data.shards that each shard comes from.
        buckets: bucket names in order of first appearance.
        embed_dim: D of every prompt embedding.
        folder: of the first shard.
    """

    def __init__(
        self,
        shards: Sequence[tuple[Path | Remote, ShardRecord]],
        cache: ShardCache | None = None,
        entries: Sequence[int] | None = None,
    ) -> None:
        records = [record for _, record in shards]
        self.entry = np.zeros(len(shards), dtype=np.int64) if entries is None else np.array(entries, dtype=np.int64)
        self.paths = [path for path, _ in shards]
        self._cache = cache or ShardCache()
        self._wanted: dict[int, Wanted] = {}
        self.folder = self.paths[0].parent
        self._records = records
        self._kinds: dict[str, Held] = {}
        for path, record in shards:
            self._check_kind(path, record)
        self.buckets = list(self._kinds)
        self.embed_dim = records[0].embed_dim
        counts = [len(record.keys) for record in records]
        number = {name: i for i, name in enumerate(self.buckets)}
        self._first = np.cumsum([0, *counts])  # of each shard's samples
        self.keys = [key for record in records for key in record.keys]
        self.shard = np.repeat(np.arange(len(records), dtype=np.int64), counts)
        self.bucket = np.repeat(np.array([number[record.bucket] for record in records], dtype=np.int64), counts)
        self.offset = np.array([value for record in records for value in record.offsets], dtype=np.int64)
        self.size = np.array([value for record in records for value in record.sizes], dtype=np.int64)
        self.crc32 = np.array([value for record in records for value in record.crc32], dtype=np.uint32)

    def _check_kind(self, path: Path | Remote, record: ShardRecord) -> None:
        first = self._records[0]
        if record.embed_dim != first.embed_dim:
            raise UserError(
                f"{path}: prompt_embeds have D={record.embed_dim}, {self.paths[0]} has D={first.embed_dim}; "
                "encode all shards with one text encoder"
            )
        known = self._kinds.setdefault(record.bucket, record.held)
        if known != record.held:
            raise UserError(
                f"{path}: bucket '{record.bucket}' has {record.held.text()}, in the shards before {known.text()}; give"
                " every kind of shard its own bucket name"
            )

    @classmethod
    def open(cls, shards: PathLike | Sequence[PathLike], cache: ShardCache | None = None) -> ShardIndex:
        """Open a folder, a path or brace pattern of tars, an address, or a list of those, concatenated in order.

        Reads indexes and file sizes only; of what lies elsewhere `cache` (by default the default folder's) keeps the
        indexes, and the shards that have none. Raises `UserError` for what is missing, not indexed or of another size.
        """
        entries = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
        cache = cache or ShardCache()
        found = [(shard, number) for number, entry in enumerate(entries) for shard in _expand(os.fspath(entry), cache)]
        if not found:
            raise UserError("data.shards: names no shard; give a folder, a pattern of tars, or a list of those")
        return cls([shard for shard, _ in found], cache, [number for _, number in found])

    def local_path(self, shard: int) -> Path:
        """The file of shard number `shard` on this node; one from elsewhere is fetched, which may take long.

        The cache may give such a file up at any time: open it at once, or use `open_shard`.

        Raises:
            OSError: a failure that may pass, as of the network.
            CorruptSample: one that will not: no such file, no access, another size than the index says.
        """
        path = self.paths[shard]
        return path if isinstance(path, Path) else self._cache.path(self._want(shard, path))

    def open_shard(self, shard: int) -> int:
        """A descriptor, for reading, of the file of shard number `shard`; raises as `local_path`.

        The cache gives a shard up last that is open. One that went all the same (`os.fstat(...).st_nlink == 0`) stays
        readable, but takes its room on the disk until it is closed.
        """
        path = self.paths[shard]
        if isinstance(path, Path):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._cache.open(self._want(shard, path))

    def _want(self, shard: int, remote: Remote) -> Wanted:
        if shard not in self._wanted:
            self._wanted[shard] = Wanted.of(remote, self._records[shard])
        return self._wanted[shard]

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    def held(self, bucket: int | str) -> Held:
        """What the samples of a bucket, given by its name or number, hold beside prompt embeddings."""
        return self._kinds[self.buckets[bucket] if isinstance(bucket, int) else bucket]

    def latent_shape(self, bucket: int | str) -> LatentShape:
        """(C, F, H, W) of a bucket, given by its name or number."""
        c, f, h, w = self.held(bucket).latent_shape
        return c, f, h, w

    def has_latents(self, bucket: int | str) -> bool:
        """Whether the samples of a bucket hold latents, not captions only."""
        return self.held(bucket).latents

    def has_noise(self, bucket: int | str) -> bool:
        """Whether the samples of a bucket are pairs: latents with the noise that a teacher made them of."""
        return self.held(bucket).noise

    def foreign_place(self, sample: int) -> ForeignPlace | None:
        """Where a sample of a foreign shard lies (sgmd_dist/data/foreign.py), or None in a shard of our own layout."""
        shard = int(self.shard[sample])
        return self._records[shard].foreign_place(sample - int(self._first[shard]))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what training sees, in order: buckets, latent shapes, keys, sizes, crc32; not of paths."""
        digest = hashlib.sha256()
        for record in self._records:
            content = {k: v for k, v in record.to_json().items() if k not in _PLACES}
            digest.update(json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def negative_prompt(self) -> Tensor:
        """The data set's negative prompt embedding, `[n_tokens, D]` bf16, the same wherever there is one.

        Raises:
            UserError: no folder of the list holds one, two differ, or its width is not the shards'.
        """
        folders = list(dict.fromkeys(path.parent for path in self.paths if isinstance(path, Path) or not path.is_pipe))
        found = [(folder, embeds) for folder in folders if (embeds := self._negative_prompt_in(folder)) is not None]
        if not found:
            raise UserError(
                f"{self.paths[0]}: there is no {NEGATIVE_PROMPT_NAME} beside the shards; write it with"
                " sgmd_dist.data.format.write_negative_prompt into a folder of data.shards, where one entry with it is"
                " enough for all"
            )
        where, first = found[0]
        if first.shape[1] != self.embed_dim:
            raise UserError(
                f"{where}/{NEGATIVE_PROMPT_NAME}: D={first.shape[1]}, the shards have D={self.embed_dim}; "
                "encode it with the shards' text encoder"
            )
        for folder, embeds in found[1:]:
            if not torch.equal(embeds, first):
                raise UserError(f"{folder}/{NEGATIVE_PROMPT_NAME}: differs from {where}'s; use one for all")
        return first

    def _negative_prompt_in(self, folder: Path | Remote) -> Tensor | None:
        if isinstance(folder, Path):
            return read_negative_prompt(folder) if (folder / NEGATIVE_PROMPT_NAME).exists() else None
        data = read_remote_prompt(folder, self._cache)
        return None if data is None else parse_negative_prompt(data, folder.inside(NEGATIVE_PROMPT_NAME))
