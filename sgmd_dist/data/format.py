"""The bytes of a sample: keys, safetensors headers, the negative prompt.

The folder and its members are described in sgmd_dist/data/shards.py. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError

NEGATIVE_PROMPT_NAME = "negative_prompt.safetensors"
TENSORS_SUFFIX = "sample.safetensors"
VIDEO_TENSORS = ("latents", "noise", "condition_latents")  # each of a sample's latent shape
TENSORS = (*VIDEO_TENSORS, "prompt_embeds", "image_embeds")
_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip

# What a sample may say of itself before anything is allocated for it. Ours takes 200 bytes of header for two tensors.
MAX_HEADER_BYTES = 1 << 18
_MAX_DIMS = 8
_MAX_ELEMENTS = 1 << 40
_DATA_ALIGNMENT_BYTES = 64  # members of a tar begin at 512; a read whose bytes lie at 16 takes a third longer

_KEY = re.compile(r"[^\s./\\]{1,80}")  # 80: a USTAR member name has 100 bytes, the longer suffix takes 19


_BRIEF = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxdict = 9
_BRIEF.maxstring = _BRIEF.maxother = 80


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


def safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file whose data begin at a multiple of 64: the header ends in spaces, as the format allows."""
    data = save_safetensors(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    padding = -start % _DATA_ALIGNMENT_BYTES
    return b"".join([(start - 8 + padding).to_bytes(8, "little"), data[8:start], b" " * padding, data[start:]])


def safetensors_header_bytes(head: memoryview, total_bytes: int) -> int:
    """Where the data start in a file of `total_bytes` whose first 8 or more bytes are `head`."""
    if total_bytes < 8 or len(head) < 8:
        raise CorruptSample(f"a safetensors file has at least 8 bytes, this one has {total_bytes}")
    start = 8 + int.from_bytes(head[:8], "little")
    if start > total_bytes:
        raise CorruptSample(f"safetensors header length {start - 8} is longer than the {total_bytes} bytes there are")
    if start > MAX_HEADER_BYTES:
        raise CorruptSample(f"safetensors header length {start - 8} is longer than the {MAX_HEADER_BYTES} allowed")
    return start


def safetensors_layout(head: memoryview, total_bytes: int) -> list[TensorSpan]:
    """The tensors of a safetensors file in file order; `head` holds at least its header.

    Raises `CorruptSample` unless every tensor has a known dtype, bytes for exactly its shape, and the tensors cover
    the data without gap or overlap.
    """
    start = safetensors_header_bytes(head, total_bytes)
    try:
        header = json.loads(bytes(head[8:start]).decode(), object_pairs_hook=_no_duplicates)
    except CorruptSample:
        raise
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
                f"tensor {brief(span.name)} starts at byte {span.begin}, expected {position}: gap or overlap"
            )
        position = span.end
    if position != total_bytes:
        raise CorruptSample(f"safetensors header describes {position} bytes, there are {total_bytes}")
    return spans


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are unique: of two entries one reader would take the first, another the last."""
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise CorruptSample(f"safetensors header names {brief(max(names, key=names.count))} twice")
    return content


def _span(name: str, entry: Any, start: int) -> TensorSpan:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = _DTYPES.get(str(entry.get("dtype"))), entry.get("shape"), entry.get("data_offsets")
    tensor = f"tensor {brief(name)}"
    if dtype is None:
        raise CorruptSample(f"{tensor} has dtype {brief(entry.get('dtype'))}, expected one of {', '.join(_DTYPES)}")
    if not is_counts(shape) or not is_counts(offsets) or len(offsets) != 2:
        raise CorruptSample(f"{tensor} has shape {brief(shape)}, data_offsets {brief(offsets)}: expected counts")
    # An empty tensor may claim any size beside its 0, therefore max(size, 1).
    if len(shape) > _MAX_DIMS or prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise CorruptSample(
            f"{tensor} has shape {brief(shape)}: more than {_MAX_DIMS} dims or {_MAX_ELEMENTS} elements"
        )
    num_bytes = prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise CorruptSample(
            f"{tensor} {brief(shape)} {entry['dtype']} needs {num_bytes} bytes, data_offsets {brief(offsets)}"
        )
    return TensorSpan(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def is_counts(value: Any) -> bool:
    """Whether a JSON value is a list of integers >= 0 that a file can have bytes for (`true` is no integer)."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return min(value, default=0) >= 0 and max(value, default=0) < 1 << 63


def brief(value: Any) -> str:
    """`repr` of a value from a file, for a message: of bounded length."""
    return _BRIEF.repr(value)


def is_finite(tensor: Tensor) -> bool:
    """Whether a bf16 tensor holds neither NaN nor infinity (all exponent bits set): 50 times torch.isfinite's speed."""
    bits = tensor.contiguous().view(torch.int16).numpy()
    return bool((bits & 0x7FFF).max(initial=0) < 0x7F80)


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
    return f"make it with python launch/prepare.py index {folder}"


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
        raise UserError(
            f"{path}: not found; {consolidate_call(path.parent)} --text-encoder DIFFUSERS_FOLDER, or "
            "--negative-prompt-from another data set"
        )
    return parse_negative_prompt(path.read_bytes(), path)


def parse_negative_prompt(data: bytes, where: object) -> Tensor:
    """The embedding `[n_tokens, D]` bf16 in a file's bytes. Raises `UserError` that begins with `where`."""
    try:
        embeds = parse_safetensors(memoryview(bytearray(data))).get("prompt_embeds")
    except CorruptSample as error:
        raise UserError(f"{where}: {error}; write it again") from error
    if embeds is None or embeds.ndim != 2 or embeds.dtype != torch.bfloat16:
        raise UserError(f"{where}: holds no bfloat16 'prompt_embeds' [n_tokens, D]; write it again")
    return embeds
