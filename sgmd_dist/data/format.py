"""The bytes of a shard: safetensors headers, tar members, index records, files that appear whole or not at all.

The folder and its members are described in sgmd_dist/data/shards.py. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError

INDEX_VERSION = 1
NEGATIVE_PROMPT_NAME = "negative_prompt.safetensors"
TENSORS_SUFFIX = "sample.safetensors"
_TAR_BLOCK_BYTES = 512
_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip

_KEY = re.compile(r"[^\s./\\]{1,80}")  # 80: a USTAR member name has 100 bytes, the longer suffix takes 19


class CorruptSample(UserError):
    """Bytes of a sample that are not what the format or the index says."""


def check_key(key: str, tar_path: Path) -> None:
    """Raise `UserError` for a key that webdataset would split or a tar would not hold."""
    if not (key.isascii() and key.isprintable() and _KEY.fullmatch(key)):
        raise UserError(
            f"{tar_path}: key {key!r} must be 1 to 80 ASCII characters without '.', '/', '\\' and spaces, because "
            f"webdataset splits names there; rename it, for example {re.sub(r'[^A-Za-z0-9_-]', '_', key)[:80]!r}"
        )


# ---------------------------------------------------------------------------------------------- safetensors


@dataclass(frozen=True)
class TensorSpan:
    """A tensor's place in a safetensors file: bytes [begin, end) from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def safetensors_header_bytes(head: memoryview, total_bytes: int) -> int:
    """Where the data start in a file of `total_bytes` whose first 8 or more bytes are `head`."""
    if total_bytes < 8 or len(head) < 8:
        raise CorruptSample(f"a safetensors file has at least 8 bytes, this one has {total_bytes}")
    start = 8 + int.from_bytes(head[:8], "little")
    if start > total_bytes:
        raise CorruptSample(f"safetensors header length {start - 8} is longer than the {total_bytes} bytes there are")
    return start


def safetensors_layout(head: memoryview, total_bytes: int) -> list[TensorSpan]:
    """The tensors of a safetensors file in file order; `head` holds at least its header.

    Raises `CorruptSample` unless every tensor has a known dtype, bytes for exactly its shape, and the tensors cover
    the data without gap or overlap.
    """
    start = safetensors_header_bytes(head, total_bytes)
    try:
        header = json.loads(bytes(head[8:start]))
    except (ValueError, RecursionError) as error:
        raise CorruptSample(f"safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CorruptSample(f"safetensors header is a JSON {type(header).__name__}, expected an object")
    spans = [_span(name, entry, start) for name, entry in header.items() if name != "__metadata__"]
    spans.sort(key=lambda span: (span.begin, span.end))
    position = start
    for span in spans:
        if span.begin != position:
            raise CorruptSample(
                f"tensor {span.name!r} starts at byte {span.begin}, expected {position}: gap or overlap"
            )
        position = span.end
    if position != total_bytes:
        raise CorruptSample(f"safetensors header describes {position} bytes, there are {total_bytes}")
    return spans


def _span(name: str, entry: Any, start: int) -> TensorSpan:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = _DTYPES.get(str(entry.get("dtype"))), entry.get("shape"), entry.get("data_offsets")
    if dtype is None:
        raise CorruptSample(f"tensor {name!r} has dtype {entry.get('dtype')!r}, expected one of {', '.join(_DTYPES)}")
    if not is_counts(shape) or not is_counts(offsets) or len(offsets) != 2:
        raise CorruptSample(f"tensor {name!r} has shape {shape!r}, data_offsets {offsets!r}: expected lists of counts")
    num_bytes = prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise CorruptSample(f"tensor {name!r} {shape} {entry['dtype']} needs {num_bytes} bytes, data_offsets {offsets}")
    return TensorSpan(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def parse_safetensors(buffer: memoryview) -> dict[str, Tensor]:
    """The tensors of a whole safetensors file as views of `buffer` (a read-only buffer is copied once).

    Raises `CorruptSample` where the header disagrees with the bytes.
    """
    buffer = memoryview(buffer).cast("B")
    spans = safetensors_layout(buffer, len(buffer))
    source = bytearray(buffer) if buffer.readonly else buffer
    tensors = {}
    for span in spans:
        if span.begin == span.end:  # torch.frombuffer refuses to make an empty tensor
            tensors[span.name] = torch.empty(span.shape, dtype=span.dtype)
            continue
        flat = torch.frombuffer(source, dtype=torch.uint8, count=span.end - span.begin, offset=span.begin)
        aligned = flat if flat.data_ptr() % span.dtype.itemsize == 0 else flat.clone()
        tensors[span.name] = aligned.view(span.dtype).reshape(span.shape)
    return tensors


def read_json(path: Path, mend: str) -> Any:
    """The content of a JSON file; a `UserError` that ends with `mend` where it is absent or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {mend}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {mend}") from error


def consolidate_call(folder: Path) -> str:
    """How to mend a missing or old index, for messages."""
    return f"make it with sgmd_dist.data.shards.consolidate({str(folder)!r})"


# ---------------------------------------------------------------------------------------------- the index


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


# ---------------------------------------------------------------------------------------------- negative prompt


def write_negative_prompt(folder: str | os.PathLike[str], prompt_embeds: Tensor) -> None:
    """Store the data set's negative (unconditional) prompt embedding `[n_tokens, D]` as bf16."""
    if prompt_embeds.ndim != 2 or 0 in prompt_embeds.shape or not bool(torch.isfinite(prompt_embeds).all()):
        raise UserError(f"{folder}: the negative prompt is {list(prompt_embeds.shape)}, expected finite [n_tokens, D]")
    stored = prompt_embeds.detach().to("cpu", torch.bfloat16).contiguous()
    write_durably(Path(folder) / NEGATIVE_PROMPT_NAME, save_safetensors({"prompt_embeds": stored}))


def read_negative_prompt(folder: str | os.PathLike[str]) -> Tensor:
    """The data set's negative prompt embedding, `[n_tokens, D]` bf16."""
    path = Path(folder) / NEGATIVE_PROMPT_NAME
    if not path.is_file():
        raise UserError(f"{path}: not found; write it with sgmd_dist.data.shards.write_negative_prompt")
    try:
        embeds = parse_safetensors(memoryview(bytearray(path.read_bytes()))).get("prompt_embeds")
    except CorruptSample as error:
        raise UserError(f"{path}: {error}; write it again") from error
    if embeds is None or embeds.ndim != 2 or embeds.dtype != torch.bfloat16:
        raise UserError(f"{path}: holds no bfloat16 'prompt_embeds' [n_tokens, D]; write it again")
    return embeds
