"""What a checkpoint holds, and whether its files are what was saved: one process, one chunk of a tensor at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from sgmd_dist.checkpoint import folder
from sgmd_dist.checkpoint.folder import DamagedCheckpoint, Meta, damaged
from sgmd_dist.checkpoint.loading import read_metadata
from sgmd_dist.checksum import sum_of_bits, wrap
from sgmd_dist.errors import UserError, describe

_HEAD = ("tree", "tensors", "elements", "bytes")


@dataclass
class TreeFacts:
    """One tree: how many tensors, elements and bytes it has, and the checksum of what was read."""

    num_tensors: int = 0
    num_elements: int = 0
    num_bytes: int = 0
    checksum: int = 0


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's description and trees, as far as they could be read, and what is wrong with it, if anything."""

    path: Path
    meta: Meta | None
    trees: dict[str, TreeFacts]
    wrong: str | None

    def text(self) -> str:
        """The facts as lines for people, the verdict last."""
        lines = [str(self.path), *(self._facts(self.meta) if self.meta is not None else [])]
        if self.trees:
            rows = [(n, t.num_tensors, t.num_elements, t.num_bytes) for n, t in self.trees.items()]
            width = max(len(name) for name in self.trees)
            lines += [f"  {_HEAD[0]:{width}} {_HEAD[1]:>8} {_HEAD[2]:>15} {_HEAD[3]:>17}"]
            lines += [f"  {name:{width}} {a:8} {b:15,} {c:17,}" for name, a, b, c in rows]
        return "\n".join(
            [*lines, f"  {'OK: every file and checksum is as saved' if self.wrong is None else self.wrong}"]
        )

    def _facts(self, meta: Meta) -> list[str]:
        versions = ", ".join(f"{name} {version}" for name, version in meta.versions.items())
        saved = [f"saved {meta.saved_at}" if meta.saved_at else "saved", f"with {versions}"]
        if meta.layout:
            saved.append("on " + ", ".join(f"{axis} {size}" for axis, size in meta.layout.items()))
        stream = ", ".join(f"{key} {meta.stream[key]}" for key in ("unit", "seed") if key in meta.stream)
        return [f"  step {meta.step}, run {_run_name(self.path)}, stream at {stream or '?'}", f"  {' '.join(saved)}"]


def inspect(where: Path) -> list[Inspection]:
    """Read the checkpoint `where`, or every one of the run folder `where`, oldest first, and verify all of it.

    Raises:
        UserError: there is none.
    """
    if folder.is_checkpoint(where) or folder.has_name(where):
        return [_inspect(where)]
    found = folder.present(where)
    if not found:
        raise UserError(f"{where}: expected a checkpoint, or a run folder with checkpoints in {where / folder.FOLDER}")
    return [_inspect(path) for path in found]


def _inspect(path: Path) -> Inspection:
    meta, trees = None, {}
    try:
        meta = folder.read_meta(path)
        for name in sorted(meta.digests):
            folder.check_digest(path, meta, name)
        for name, tensor in _chunks(path, meta, trees):
            trees[name].checksum = wrap(trees[name].checksum + sum_of_bits(tensor))
        _compare(path, meta, trees)
    except DamagedCheckpoint as error:
        return Inspection(path, meta, trees, str(error))
    return Inspection(path, meta, trees, None)


def _chunks(path: Path, meta: Meta, trees: dict[str, TreeFacts]) -> Iterator[tuple[str, Tensor]]:
    """Every stored chunk with its tree's name, in the order of the files; fills in what the list says of the trees."""
    metadata = read_metadata(path, meta)
    tree_of = {name: str(parts[0]) for name, parts in (metadata.planner_data or {}).items()}
    missing: set[MetadataIndex] = set()
    for name, found in metadata.state_dict_metadata.items():
        if not isinstance(found, TensorStorageMetadata) or name not in tree_of:
            raise damaged(path, f"{name} is no tensor of a tree")
        facts = trees.setdefault(tree_of[name], TreeFacts())
        facts.num_tensors += 1
        facts.num_elements += found.size.numel()
        facts.num_bytes += found.size.numel() * found.properties.dtype.itemsize
        missing |= {MetadataIndex(name, chunk.offsets) for chunk in found.chunks}
    stored = sorted(metadata.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset))
    for index, place in stored:
        missing.discard(MetadataIndex(index.fqn, index.offset))
        yield tree_of[index.fqn], _read(path, place.relative_path, place.offset, place.length)
    if missing:
        raise damaged(path, f"{len(missing)} slices are nowhere, {next(iter(missing)).fqn} among them")


def _read(path: Path, name: str, offset: int, length: int) -> Tensor:
    try:
        with (path / name).open("rb") as file:
            file.seek(offset)
            return torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading damaged bytes raises
        raise damaged(path, f"{name}: {describe(error)}") from None


def _compare(path: Path, meta: Meta, trees: dict[str, TreeFacts]) -> None:
    counts = {name: facts.num_tensors for name, facts in trees.items()}
    if counts != meta.num_tensors:
        raise damaged(path, f"tensors {counts}, expected {meta.num_tensors}")
    if wrong := [name for name, facts in trees.items() if facts.checksum != meta.checksums[name]]:
        raise damaged(path, f"the checksum of {', '.join(wrong)} differs")


def _run_name(path: Path) -> str:
    """`run.name` of the recipe beside the checkpoint, of which nothing else is read: it may be of another version."""
    try:
        return str(yaml.safe_load((path / folder.RECIPE_FILE).read_text(encoding="utf-8"))["run"]["name"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return "?"
