"""A shard's record, its part of the index: where each sample lies in the tar, and of what kind all of them are."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sgmd_dist.data.format import (
    TENSORS_SUFFIX,
    CorruptSample,
    check_key,
    consolidate_call,
    is_counts,
    parse_safetensors,
    read_json,
)
from sgmd_dist.errors import UserError

INDEX_VERSION = 1
_TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class ShardRecord:
    """One shard's part of the index. The four lists have an entry per sample, in the shard's order."""

    shard: str  # file name of the tar
    tar_bytes: int
    bucket: str
    latent_shape: list[int]  # [C, F, H, W], also where the shard holds captions only
    has_latents: bool
    embed_dim: int  # D of prompt_embeds
    keys: list[str]
    offsets: list[int]  # of the safetensors member's data in the tar
    sizes: list[int]  # bytes
    crc32: list[int]

    @classmethod
    def from_json(cls, value: Any, path: Path) -> ShardRecord:
        mend = f"delete it and {consolidate_call(path.parent)}"
        names = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or value.get("version") != INDEX_VERSION:
            found = value.get("version") if isinstance(value, dict) else value
            raise UserError(f"{path}: index version is {found!r}, expected {INDEX_VERSION}; {mend}")
        missing = [name for name in names if name not in value]
        if missing:
            raise UserError(f"{path}: index lacks {', '.join(missing)}; {mend}")
        record = cls(**{name: value[name] for name in names})
        if not len(record.keys) == len(record.offsets) == len(record.sizes) == len(record.crc32):
            raise UserError(f"{path}: keys, offsets, sizes and crc32 of {record.shard} differ in length; {mend}")
        return record

    def to_json(self) -> dict[str, Any]:
        return {"version": INDEX_VERSION, **asdict(self)}

    def check_tar(self, tar_path: Path) -> None:
        """Raise `UserError` unless the tar is there with the indexed size."""
        if not tar_path.is_file():
            raise UserError(f"{tar_path}: listed in the index but not found; restore the shard or delete its indexes")
        if (size := tar_path.stat().st_size) != self.tar_bytes:
            raise UserError(
                f"{tar_path}: {size} bytes, the index says {self.tar_bytes}; the shard is truncated or was replaced: "
                f"restore it, or delete {sidecar_path(tar_path).name} and {consolidate_call(tar_path.parent)}"
            )


def sidecar_path(tar_path: Path) -> Path:
    """`shard-000000.tar` -> `shard-000000.index.json`."""
    return tar_path.with_name(tar_path.name.removesuffix(".tar") + ".index.json")


def list_tars(folder: Path) -> list[Path]:
    """The tars of a folder by name; a `UserError` where there is no folder or no tar."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check data.shards or write the data set with launch/prepare.py")
    if not (tars := sorted(folder.glob("*.tar"))):
        raise UserError(f"{folder}: holds no .tar shards; write the data set with launch/prepare.py")
    return tars


def sidecar_record(tar_path: Path) -> ShardRecord:
    """A tar's record from its sidecar, checked against the tar's size."""
    path = sidecar_path(tar_path)
    record = ShardRecord.from_json(read_json(path, consolidate_call(tar_path.parent)), path)
    record.check_tar(tar_path)
    return record


def tar_members(tar_path: Path, file: IO[bytes]) -> dict[str, dict[str, tarfile.TarInfo]]:
    """{key: {"json": member, "sample.safetensors": member, ...}} in tar order, of a whole, well-formed tar.

    tarfile takes a damaged header or a cut at a member's boundary for the end of the archive, so the end is checked.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    end, key = 0, "none"
    mend = "restore the shard or write it again"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                check_key(key, tar_path)
                if extension in samples.setdefault(key, {}):
                    raise UserError(
                        f"{tar_path}: key '{key}' has two members {member.name}; give samples keys of their own"
                    )
                samples[key][extension] = member
                end = member.offset_data + -(-member.size // _TAR_BLOCK_BYTES) * _TAR_BLOCK_BYTES
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{tar_path}: truncated or damaged after key '{key}' ({error}); {mend}") from error
    file.seek(end)
    rest = file.read()
    if len(rest) < 2 * _TAR_BLOCK_BYTES or any(rest):
        raise UserError(f"{tar_path}: no end of archive at byte {end}, truncated or damaged after key '{key}'; {mend}")
    return samples


def build_index(tar_path: str | os.PathLike[str]) -> ShardRecord:
    """Index a tar that has no sidecar by reading it whole.

    Raises `UserError` naming the shard and the key for a truncated or damaged tar, a duplicate key, a sample without
    its json or safetensors member, or samples that do not belong into one shard.
    """
    path = Path(tar_path)
    record: ShardRecord | None = None
    with open(path, "rb") as file:
        for key, members in tar_members(path, file).items():
            for extension in ("json", TENSORS_SUFFIX):
                if extension not in members:
                    raise UserError(f"{path}: sample '{key}' has no member {key}.{extension}; write the shard again")
            description, data = (_member_bytes(file, members[name]) for name in ("json", TENSORS_SUFFIX))
            try:
                shared = _describe(json.loads(description), parse_safetensors(memoryview(data)))
            except ValueError as error:  # UserErrors and JSON errors alike
                raise CorruptSample(f"{path}: sample '{key}': {error}; write the shard again") from error
            if record is None:
                record = ShardRecord(path.name, path.stat().st_size, *shared, [], [], [], [])
            expected = (record.bucket, record.latent_shape, record.has_latents, record.embed_dim)
            if shared != expected:
                raise UserError(
                    f"{path}: sample '{key}' has (bucket, latent shape, latents, D) {shared}, the shard's first sample "
                    f"{expected}; put samples of one kind into one shard"
                )
            _append(record, key, members[TENSORS_SUFFIX].offset_data, data)
    if record is None:
        raise UserError(f"{path}: holds no samples; delete it")
    return record


def _member_bytes(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _append(record: ShardRecord, key: str, offset: int, data: bytes) -> None:
    record.keys.append(key)
    record.offsets.append(offset)
    record.sizes.append(len(data))
    record.crc32.append(zlib.crc32(data))


def _describe(description: Any, tensors: dict[str, Tensor]) -> tuple[str, list[int], bool, int]:
    """(bucket, latent shape, has latents, D) of a sample."""
    if not isinstance(description, dict) or not isinstance(description.get("bucket"), str):
        raise UserError("its json has no text field 'bucket'")
    latents, embeds = tensors.get("latents"), tensors.get("prompt_embeds")
    shape = description.get("latent_shape") if latents is None else list(latents.shape)
    if not is_counts(shape) or len(shape) != 4:  # pyright: ignore[reportArgumentType]
        raise UserError(f"latent shape is {shape!r}, expected [C, F, H, W] from 'latents' or the json's latent_shape")
    if embeds is None or embeds.ndim != 2:
        raise UserError("it has no 'prompt_embeds' [n_tokens, D]")
    if any(t is not None and t.dtype != torch.bfloat16 for t in (latents, embeds)):
        raise UserError("'latents' and 'prompt_embeds' must be bfloat16")
    return description["bucket"], shape, latents is not None, embeds.shape[1]  # pyright: ignore[reportReturnType]
