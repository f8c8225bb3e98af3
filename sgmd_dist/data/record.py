"""A shard's record, its part of the index: where each sample lies in the tar, and of what kind all of them are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

from sgmd_dist.data.foreign import FOREIGN_LAYOUTS, OWN_LAYOUT, ForeignPlace
from sgmd_dist.data.format import brief, consolidate_call, is_counts, read_json
from sgmd_dist.errors import UserError

INDEX_VERSION = 1
_FOREIGN_FIELDS = ("layout", "embed_offsets", "embed_sizes")
_OPTIONAL_FIELDS = ("has_noise", "has_condition", "image_embeds")  # stored where they are set


class Held(NamedTuple):
    """What the samples of a bucket hold beside prompt embeddings; see `ShardRecord`."""

    latent_shape: tuple[int, ...]
    latents: bool
    noise: bool
    condition: bool
    image_embeds: tuple[int, ...]

    def text(self) -> str:
        """In words, for messages."""
        held = {"latents": self.latents, "noise": self.noise, "condition_latents": self.condition}
        names = [name for name, is_held in held.items() if is_held]
        names += [f"image_embeds {list(self.image_embeds)}"] if self.image_embeds else []
        return f"latent shape {list(self.latent_shape)}, tensors {', '.join(names) or 'none'}"


@dataclass(frozen=True)
class ShardRecord:
    """One shard's part of the index. The lists from `keys` on have an entry per sample, in the shard's order.

    A shard of a foreign layout (sgmd_dist/data/foreign.py) has its embeddings in a member of their own: `offsets` and
    `sizes` are the latents', `crc32` runs over the latents and then the embeddings, and these three fields are stored
    only there.
    """

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
    layout: str = OWN_LAYOUT
    embed_offsets: list[int] = field(default_factory=list)
    embed_sizes: list[int] = field(default_factory=list)
    # These are stored where they are set alone: other records stay what they were.
    has_noise: bool = False
    has_condition: bool = False  # `condition_latents`: of the images that the videos begin with
    image_embeds: list[int] = field(default_factory=list)  # [N, E], or empty where there are none

    @classmethod
    def from_json(cls, value: Any, path: Path) -> ShardRecord:
        mend = f"delete it and {consolidate_call(path.parent)}"
        if not isinstance(value, dict) or value.get("version") != INDEX_VERSION:
            found = value.get("version") if isinstance(value, dict) else value
            raise UserError(f"{path}: index version is {brief(found)}, expected {INDEX_VERSION}; {mend}")
        names = [own.name for own in fields(cls) if own.name not in (*_FOREIGN_FIELDS, *_OPTIONAL_FIELDS)]
        if value.get("layout", OWN_LAYOUT) != OWN_LAYOUT:
            names += _FOREIGN_FIELDS
        missing = [name for name in names if name not in value]
        if missing:
            raise UserError(f"{path}: index lacks {', '.join(missing)}; {mend}")
        names += [name for name in _OPTIONAL_FIELDS if name in value]
        record = cls(**{name: value[name] for name in names})
        if wrong := record._wrong():
            raise UserError(f"{path}: {wrong}; {mend}")
        return record

    def _wrong(self) -> str:
        """What of a record out of a file no writer of ours would have written; empty for a good one."""
        if self.layout not in (OWN_LAYOUT, *FOREIGN_LAYOUTS):
            return f"layout is {brief(self.layout)}, expected {OWN_LAYOUT}, {' or '.join(FOREIGN_LAYOUTS)}"
        texts = {"shard": self.shard, "bucket": self.bucket}
        if bad := next((name for name, value in texts.items() if not isinstance(value, str) or not value), None):
            return f"{bad} is {brief(texts[bad])}, expected a text"
        if "/" in self.shard or not isinstance(self.has_latents, bool):
            return (
                f"shard is {brief(self.shard)}, has_latents {brief(self.has_latents)}, expected a file name, a boolean"
            )
        if not isinstance(self.has_noise, bool):
            return f"has_noise of {self.shard} is {brief(self.has_noise)}, expected a boolean"
        if self.has_noise and not (self.has_latents and self.layout == OWN_LAYOUT):
            return f"has_noise of {self.shard} is true, expected false without latents and in layout {self.layout}"
        if wrong := self._wrong_condition():
            return wrong
        counts = {"tar_bytes": [self.tar_bytes], "embed_dim": [self.embed_dim], "latent_shape": self.latent_shape}
        places = {"offsets": self.offsets, "sizes": self.sizes, "crc32": self.crc32}
        if self.layout != OWN_LAYOUT:
            places |= {"embed_offsets": self.embed_offsets, "embed_sizes": self.embed_sizes}
        if bad := next((name for name, value in (counts | places).items() if not is_counts(value)), None):
            return f"{bad} of {self.shard} is {brief(getattr(self, bad))}, expected integers >= 0"
        if len(self.latent_shape) != 4:
            return f"latent_shape of {self.shard} is {brief(self.latent_shape)}, expected [C, F, H, W]"
        if not isinstance(self.keys, list) or not set(map(type, self.keys)) <= {str}:
            return f"keys of {self.shard} is {brief(self.keys)}, expected a list of texts"
        if any(len(value) != len(self.keys) for value in places.values()):
            return f"keys, {', '.join(list(places)[:-1])} and {list(places)[-1]} of {self.shard} differ in length"
        ends = [(self.offsets, self.sizes), (self.embed_offsets, self.embed_sizes)]
        if (end := max(max(map(add, *places), default=0) for places in ends)) > self.tar_bytes:
            return f"a sample of {self.shard} ends at byte {end}, the tar at {self.tar_bytes}"
        if max(self.crc32, default=0) >= 1 << 32:
            return f"crc32 of {self.shard} holds {max(self.crc32)}, which takes more than 32 bits"
        return ""

    def _wrong_condition(self) -> str:
        if not isinstance(self.has_condition, bool) or (self.has_condition and self.layout != OWN_LAYOUT):
            return f"has_condition of {self.shard} is {brief(self.has_condition)}, expected a boolean, false in foreign"
        is_shape = is_counts(self.image_embeds) and len(self.image_embeds) in (0, 2) and 0 not in self.image_embeds
        if not is_shape or (self.image_embeds and not self.has_condition):
            return f"image_embeds of {self.shard} is {brief(self.image_embeds)}, expected [N, E] beside a condition"
        return ""

    @property
    def held(self) -> Held:
        """What each of its samples holds."""
        shapes = tuple(self.latent_shape), tuple(self.image_embeds)
        return Held(shapes[0], self.has_latents, self.has_noise, self.has_condition, shapes[1])

    def foreign_place(self, number: int) -> ForeignPlace | None:
        """Where the members of sample `number` lie, or None in our own layout."""
        if self.layout == OWN_LAYOUT:
            return None
        return ForeignPlace(
            (self.offsets[number], self.sizes[number]),
            (self.embed_offsets[number], self.embed_sizes[number]),
            self.crc32[number],
        )

    def to_json(self) -> dict[str, Any]:
        content = {"version": INDEX_VERSION, **asdict(self)}
        if self.layout == OWN_LAYOUT:
            for name in _FOREIGN_FIELDS:
                del content[name]
        for name in _OPTIONAL_FIELDS:
            if not content[name]:
                del content[name]
        return content

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
