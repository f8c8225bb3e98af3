"""Shards of FastGen and rCM, read as they are: tensors in pickles of torch.save, which are never executed.

    layout    latents [C, F, H, W]   prompt_embeds [n_tokens, D]   caption
    fastgen   KEY.latent.pth         KEY.txt_emb.pth               KEY.txt, where there is one
    rcm       KEY.latent.pt          KEY.embed.pt                  KEY.prompt.txt

The index of such a shard says its layout and where both members lie; the tar stays as it is. Tensors of any floating
dtype are cast to bf16; a leading dimension of 1 is dropped. Text that was padded with zeros stays so: the stream pads
with zeros anyway. The latents must be normalised as the model expects them, as FastGen's and rCM's are.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgmd_dist.data.format import NEGATIVE_PROMPT_NAME, TENSORS_SUFFIX, CorruptSample, read_negative_prompt
from sgmd_dist.errors import UserError

OWN_LAYOUT = "safetensors"
_NUM_DIMS = {"latents": 4, "prompt_embeds": 2}


@dataclass(frozen=True)
class ForeignLayout:
    """The members of a sample, by what follows the key and a dot in their names."""

    latents: str
    prompt_embeds: str


FOREIGN_LAYOUTS = {
    "fastgen": ForeignLayout("latent.pth", "txt_emb.pth"),
    "rcm": ForeignLayout("latent.pt", "embed.pt"),
}
TENSOR_SUFFIXES = (TENSORS_SUFFIX, *(name for own in FOREIGN_LAYOUTS.values() for name in vars(own).values()))


@dataclass(frozen=True)
class ForeignPlace:
    """Where a sample lies in its tar, in bytes; crc32 runs over the latents' member and then the embeddings'."""

    latents: tuple[int, int]  # offset, size
    prompt_embeds: tuple[int, int]
    crc32: int


def decode_tensor(data: bytes | bytearray, num_dims: int) -> Tensor:
    """The floating-point tensor that torch.save wrote into `data`, as contiguous bf16 of `num_dims` dimensions.

    Leading dimensions of 1 beyond them are dropped. Nothing that the pickle asks for is executed, and nothing larger
    than `data` is allocated. Raises `CorruptSample` for whatever else `data` is.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        raise CorruptSample(f"not a file of torch.save in its zip format ({error})") from error
    if not stored:  # torch.save never compresses; a few bytes could unpack to any number
        raise CorruptSample("not a file of torch.save: its entries are compressed")
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes made to harm fail in every way there is
        reason = str(error).partition("WeightsUnpickler error: ")
        why = " ".join((reason[2] or reason[0]).split())[:200]
        raise CorruptSample(f"refused by torch.load(weights_only=True), not executed: {why}") from error
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
        what = f"{tensor.dtype} {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CorruptSample(f"holds {what}, expected one dense floating-point tensor")
    if tensor.numel() * tensor.element_size() > len(data):  # an expanded view of a small storage
        raise CorruptSample(f"holds a tensor {list(tensor.shape)} of more bytes than the file's {len(data)}")
    while tensor.ndim > num_dims and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != num_dims or 0 in tensor.shape:
        raise CorruptSample(f"holds a tensor {list(tensor.shape)}, expected {num_dims} dimensions, none of size 0")
    return tensor.detach().to(torch.bfloat16).contiguous()


def read_foreign(file: int, place: ForeignPlace, *, check_crc: bool) -> dict[str, Tensor]:
    """`latents` and `prompt_embeds` of a sample, bf16, from the open tar `file` (a descriptor).

    Raises:
        CorruptSample: the tar ends before, the crc32 is another, or a member is no tensor.
    """
    members: dict[str, bytes | bytearray] = {
        "latents": _read(file, place.latents),
        "prompt_embeds": _read(file, place.prompt_embeds),
    }
    if check_crc and (crc32 := crc32_of(*members.values())) != place.crc32:
        raise CorruptSample(f"crc32 is {crc32:08x}, the index says {place.crc32:08x}: the bytes are damaged")
    return decode_members(members)


def decode_members(members: dict[str, bytes | bytearray]) -> dict[str, Tensor]:
    """The tensors of {"latents": bytes, "prompt_embeds": bytes}; an error names the member."""
    tensors = {}
    for name, data in members.items():
        try:
            tensors[name] = decode_tensor(data, _NUM_DIMS[name])
        except CorruptSample as error:
            raise CorruptSample(f"{name}: {error}") from error
    return tensors


def fill_foreign(
    file: int,
    place: ForeignPlace,
    latent_shape: tuple[int, ...],
    embed_dim: int,
    rows: Mapping[str, NDArray[np.uint8]],
    *,
    check_crc: bool,
) -> None:
    """Read a sample into its rows of a batch (bytes of bf16, by name), its text cut or zero-padded to the row's length.

    Raises:
        CorruptSample: as `read_foreign`, and for shapes that are not the index's.
    """
    tensors = read_foreign(file, place, check_crc=check_crc)
    if "latents" in rows and tensors["latents"].shape != latent_shape:
        raise CorruptSample(f"latents is {list(tensors['latents'].shape)}, the index says {list(latent_shape)}")
    embeds, text = tensors["prompt_embeds"], rows["prompt_embeds"]
    if embeds.shape[1] != embed_dim:
        raise CorruptSample(f"prompt_embeds is {list(embeds.shape)}, expected [n_tokens, {embed_dim}]")
    if "latents" in rows:
        rows["latents"][:] = _bytes(tensors["latents"])
    source = _bytes(embeds)[: text.size]
    text[: source.size], text[source.size :] = source, 0


def read_negative_embeds(source: Path) -> Tensor:
    """A negative prompt's embedding `[n_tokens, D]`, bf16: of another data set's folder, or a file.

    Args:
        source: a folder with negative_prompt.safetensors, or a .npy file (FastGen's neg_prompt_emb.npy), or a .pt or
            .pth file of one tensor (rCM's umT5_wan_negative_emb.pt). No pickle is executed.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if source.is_dir() or source.name == NEGATIVE_PROMPT_NAME:
        return read_negative_prompt(source if source.is_dir() else source.parent)
    try:
        if source.suffix == ".npy":
            array = np.load(source, allow_pickle=False)
            embeds = torch.from_numpy(array.reshape(array.shape[-2:]).astype(np.float32)).bfloat16()
        else:
            embeds = decode_tensor(source.read_bytes(), 2)
        if embeds.ndim != 2:
            raise UserError(f"holds an array {list(embeds.shape)}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source}: {error}; give a data set's folder, or a .npy or .pt file with an embedding [n_tokens, D]"
        ) from error
    return embeds


def crc32_of(*parts: bytes | bytearray | memoryview) -> int:
    """The crc32 of `parts` one after the other."""
    crc32 = 0
    for part in parts:
        crc32 = zlib.crc32(part, crc32)
    return crc32


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _read(file: int, place: tuple[int, int]) -> bytearray:
    offset, size = place
    data = bytearray(size)
    done = 0
    while done < size:
        num_bytes = os.preadv(file, [memoryview(data)[done:]], offset + done)
        if num_bytes == 0:
            raise CorruptSample(f"the shard ends at byte {offset + done}, it is truncated")
        done += num_bytes
    return data
