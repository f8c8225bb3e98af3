"""What a sample in a tar says of itself: read whole, for building an index and for verifying one."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmd_dist.data.foreign import FOREIGN_LAYOUTS, OWN_LAYOUT, crc32_of, decode_members
from sgmd_dist.data.format import TENSORS, TENSORS_SUFFIX, CorruptSample, brief, is_counts, is_finite, parse_safetensors
from sgmd_dist.data.members import Members, whole_scan
from sgmd_dist.data.record import ShardRecord
from sgmd_dist.errors import UserError

_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".pyd", ".ckpt")  # webdataset's default decoders would load them


KIND_IN_WORDS = "(bucket, latent shape, latents, D, noise, condition, image embeds)"


class Kind(NamedTuple):
    """What the samples of a shard have in common."""

    bucket: str
    latent_shape: list[int]  # [C, F, H, W]
    has_latents: bool
    embed_dim: int
    has_noise: bool = False
    has_condition: bool = False
    image_embeds: list[int] = []  # noqa: RUF012 - [N, E]; never changed


@dataclass(frozen=True)
class RawSample:
    """A sample's members as bytes: `tensors` in the order of the record's crc32, `description` its json or None."""

    layout: str
    tensors: dict[str, tuple[tarfile.TarInfo, bytearray]]
    description: bytearray | None
    pickles: list[str]

    @property
    def place(self) -> dict[str, int]:
        """The sample's entries in the lists of a `ShardRecord`, by their names."""
        (first, data), *rest = self.tensors.values()
        place = {"offsets": first.offset_data, "sizes": first.size}
        place["crc32"] = crc32_of(*(content for _, content in self.tensors.values())) if rest else zlib.crc32(data)
        for member, _ in rest:
            place |= {"embed_offsets": member.offset_data, "embed_sizes": member.size}
        return place


def read_sample(file: BufferedReader, key: str, members: Members, layout: str) -> RawSample:
    """Read a sample's members.

    Raises:
        CorruptSample: one of its members is missing.
    """
    names = {TENSORS_SUFFIX: TENSORS_SUFFIX} if layout == OWN_LAYOUT else vars(FOREIGN_LAYOUTS[layout])
    needed = [*(["json"] if layout == OWN_LAYOUT else []), *names.values()]
    if missing := [name for name in needed if name not in members]:
        there = ", ".join(brief(f"{key}.{name}") for name in members)
        raise CorruptSample(
            f"has no member {key}.{missing[0]}, only {there}; write the shard again (readable are KEY.json with"
            f" KEY.{TENSORS_SUFFIX}, FastGen's KEY.latent.pth with KEY.txt_emb.pth, rCM's KEY.latent.pt with "
            "KEY.embed.pt)"
        )
    read = {name: member_bytes(file, members[extension]) for name, extension in names.items()}
    return RawSample(
        layout,
        {name: (members[extension], read[name]) for name, extension in names.items()},
        member_bytes(file, members["json"]) if "json" in members else None,
        [name for name in members if name.endswith(_PICKLES)] if layout == OWN_LAYOUT else [],
    )


def tensors_of(sample: RawSample) -> dict[str, Tensor]:
    """A sample's tensors by name.

    Raises:
        CorruptSample: its bytes are none.
    """
    if sample.layout == OWN_LAYOUT:
        return parse_safetensors(memoryview(sample.tensors[TENSORS_SUFFIX][1]))
    return decode_members({name: data for name, (_, data) in sample.tensors.items()})


def describe(sample: RawSample) -> tuple[Kind | None, list[str]]:
    """A sample's kind, where that can be told, and everything that is wrong with its content."""
    mistakes = [f"has a member .{name}: shards of this layout hold no pickles; remove it" for name in sample.pickles]
    content: Any = {}
    try:
        content = {} if sample.description is None else json.loads(sample.description)
    except (ValueError, RecursionError) as error:
        mistakes.append(f"its json cannot be read: {error}")
    else:
        if not isinstance(content, dict):
            mistakes.append(f"its json is {brief(content)}, expected an object")
            content = {}
        elif sample.layout == OWN_LAYOUT and not isinstance(content.get("bucket"), str):
            mistakes.append("its json has no text field 'bucket'")
        elif not isinstance(content.get("caption", ""), str):
            mistakes.append(f"its json has the caption {brief(content['caption'])}, expected a text")
    try:
        tensors = tensors_of(sample)
    except CorruptSample as error:
        return None, [*mistakes, str(error)]
    latents, embeds = tensors.get("latents"), tensors.get("prompt_embeds")
    shape = content.get("latent_shape") if latents is None else list(latents.shape)
    mistakes += _wrong_tensors(tensors, shape)
    bucket = content.get("bucket")
    if mistakes or embeds is None or not isinstance(shape, list):
        return None, mistakes
    if not isinstance(bucket, str):
        bucket = "x".join(map(str, shape))
    image = list(tensors["image_embeds"].shape) if "image_embeds" in tensors else []
    has_noise, has_condition = "noise" in tensors, "condition_latents" in tensors
    return Kind(bucket, shape, latents is not None, embeds.shape[1], has_noise, has_condition, image), []


def _wrong_tensors(tensors: dict[str, Tensor], shape: Any) -> list[str]:
    mistakes = []
    latents, embeds, noise = (tensors.get(name) for name in ("latents", "prompt_embeds", "noise"))
    if not is_counts(shape) or len(shape) != 4 or 0 in shape:
        mistakes.append(
            f"latent shape is {brief(shape)}, expected [C, F, H, W] from 'latents' or the json's latent_shape"
        )
    if embeds is None or embeds.ndim != 2 or 0 in embeds.shape:
        mistakes.append("it has no 'prompt_embeds' [n_tokens, D]")
    if noise is not None and (latents is None or noise.shape != latents.shape):
        beside = "no 'latents'" if latents is None else f"'latents' {list(latents.shape)}"
        mistakes.append(f"'noise' is {list(noise.shape)} beside {beside}: expected the latents' shape")
    condition, image = tensors.get("condition_latents"), tensors.get("image_embeds")
    if condition is not None and list(condition.shape) != shape:
        mistakes.append(f"'condition_latents' is {list(condition.shape)}, expected the latent shape {brief(shape)}")
    if image is not None and (condition is None or image.ndim != 2 or 0 in image.shape):
        mistakes.append(f"'image_embeds' is {list(image.shape)}, expected [N, E] beside 'condition_latents'")
    for name in TENSORS:
        if (tensor := tensors.get(name)) is None:
            continue
        if tensor.dtype != torch.bfloat16:
            mistakes.append(f"'{name}' is {tensor.dtype}, must be bfloat16")
        elif not is_finite(tensor):
            mistakes.append(f"'{name}' holds values that are not finite; encode the sample again")
    return mistakes


def build_index(tar_path: str | os.PathLike[str]) -> ShardRecord:
    """Index a tar that has no sidecar by reading it whole; a foreign layout is recognized by its members.

    Raises `UserError` naming the shard and the key for a truncated or damaged tar, a duplicate key, a sample that
    lacks a member or holds what cannot be trained on, or samples that do not belong into one shard.
    """
    path = Path(tar_path)
    kind: Kind | None = None
    places: dict[str, list[int]] = {}
    with open(path, "rb") as file:
        scan = whole_scan(path, file)
        for key, members in scan.samples.items():
            where = f"{path}: sample '{key}'"
            try:
                sample = read_sample(file, key, members, scan.layout)
            except CorruptSample as error:
                raise CorruptSample(f"{where} {error}") from error
            found, mistakes = describe(sample)
            if found is None or mistakes:
                raise CorruptSample(f"{where}: {mistakes[0]}; write the shard again")
            kind = kind or found
            if found != kind:
                raise UserError(
                    f"{where} has {KIND_IN_WORDS} {tuple(found)}, the shard's first sample "
                    f"{tuple(kind)}; put samples of one kind into one shard"
                )
            for name, value in sample.place.items():
                places.setdefault(name, []).append(value)
    if kind is None:
        raise UserError(f"{path}: holds no samples; delete it")
    content = {**kind._asdict(), "keys": list(scan.samples), "layout": scan.layout, **places}
    return ShardRecord(path.name, path.stat().st_size, **content)


def member_bytes(file: BufferedReader | BufferedRandom, member: tarfile.TarInfo) -> bytearray:
    """A member's content, to be looked into without another copy; the tar is known to be long enough."""
    content = bytearray(member.size)
    file.seek(member.offset_data)
    if (num_bytes := file.readinto(content)) != member.size:
        raise CorruptSample(f"{member.name} ends after {num_bytes} of {member.size} bytes; write the shard again")
    return content
