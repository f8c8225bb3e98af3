"""Reading checkpoints into networks of any world size and layout, and going on from the one before a damaged one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sgmd_dist.checkpoint import folder
from sgmd_dist.checkpoint.agreement import failure_of, together
from sgmd_dist.checkpoint.folder import DamagedCheckpoint, Meta, damaged, unfit
from sgmd_dist.checkpoint.state import Tree, checksums, training_state
from sgmd_dist.checksum import sum_of_bits, wrap
from sgmd_dist.errors import UserError
from sgmd_dist.roles import Roles

_MAX_LISTED = 5


@dataclass(frozen=True)
class Loaded:
    """The checkpoint that was loaded, and the newer ones that could not be, each with what is wrong with it."""

    path: Path
    meta: Meta
    damaged: dict[Path, str]


def load_newest(candidates: Sequence[Path], roles: Roles) -> Loaded:
    """Load the first of `candidates`, newest first and equal on all ranks, that is not damaged. Collective.

    What a damaged one left in networks, optimizers and averages is overwritten whole by the one that is loaded.

    Raises:
        UserError: every one is damaged, or the one that is not is of other networks; the same on every rank.
    """
    found: dict[Path, str] = {}
    for path in candidates:
        try:
            return Loaded(path, load(path, roles), found)
        except DamagedCheckpoint as error:
            if len(candidates) == 1:
                raise
            found[path] = str(error)
    assert found, "no checkpoint was given"
    listed = "; ".join(found.values())
    raise UserError(
        f"{candidates[0].parent}: none of {len(candidates)} checkpoints can be used; restore one, name another one with"
        f" run.resume=PATH, or start anew with run.resume=never: {listed}"
    )


def load(checkpoint: Path, roles: Roles) -> Meta:
    """Fill networks, optimizers and EMA from `checkpoint`, at any world size. Collective; before any backward.

    Raises:
        DamagedCheckpoint: its files are not what was saved; nothing may be trained before another one is loaded.
        UserError: it is of other networks. Both are the same on every rank.
    """
    tree = training_state(roles)
    meta = together(lambda: _look(checkpoint, tree))[0]
    _fill(tree, checkpoint)
    found = checksums(tree)
    if found != meta.checksums:
        raise damaged(checkpoint, f"checksums {found}, expected {meta.checksums}")
    return meta


def load_tree(checkpoint: Path, name: str, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """One tree of a checkpoint as full float32 tensors on the CPU, by this process alone.

    Raises:
        UserError: the checkpoint has no such tree, or is damaged.
    """
    meta = folder.read_meta(checkpoint)
    if name not in meta.num_tensors:
        raise UserError(f"{checkpoint}: holds no '{name}'; it has {', '.join(meta.num_tensors)}")
    if meta.num_tensors[name] != len(shapes):
        raise unfit(checkpoint, f"'{name}' has {meta.num_tensors[name]} tensors, expected {len(shapes)}")
    tensors = {key: torch.empty(shape, dtype=torch.float32) for key, shape in shapes.items()}
    _check_shapes({name: tensors}, checkpoint, meta)
    _fill({name: tensors}, checkpoint, no_dist=True)
    if wrap(sum(sum_of_bits(tensor) for tensor in tensors.values())) != meta.checksums[name]:
        raise damaged(checkpoint, f"the checksum of '{name}' differs")
    return tensors


def read_metadata(checkpoint: Path, meta: Meta) -> Metadata:
    """DCP's own list of tensors and where they are.

    Raises:
        DamagedCheckpoint: it is not what was saved.
    """
    folder.check_digest(checkpoint, meta, folder.METADATA_FILE)
    try:
        return dcp.FileSystemReader(checkpoint).read_metadata()
    except Exception as error:  # whatever unpickling damaged bytes raises
        raise damaged(checkpoint, f"its .metadata cannot be read ({error})") from error


def _look(checkpoint: Path, tree: Tree) -> Meta:
    """Compare a checkpoint's lists with what is to be filled, and this rank's share of its files with their digests."""
    meta = folder.read_meta(checkpoint)
    expected = {name: len(part) for name, part in tree.items()}
    if expected != meta.num_tensors:
        raise UserError(
            f"{checkpoint}: holds tensors {meta.num_tensors}, this recipe trains {expected}; resume with the recipe in"
            f" {checkpoint / folder.RECIPE_FILE} or set run.resume=never"
        )
    _check_shapes(tree, checkpoint, meta)
    for name in sorted(meta.digests)[dist.get_rank() :: dist.get_world_size()]:
        folder.check_digest(checkpoint, meta, name)
    return meta


def _check_shapes(tree: Tree, checkpoint: Path, meta: Meta) -> None:
    """Compare names and shapes with the checkpoint's own list, which DCP would log traces about."""
    saved = read_metadata(checkpoint, meta).state_dict_metadata
    wrong: list[str] = []
    for name, tensor in ((f"{part}.{key}", t) for part, tensors in tree.items() for key, t in tensors.items()):
        found = saved.get(name)
        if not isinstance(found, TensorStorageMetadata):
            wrong.append(f"no {name}")
        elif found.size != tensor.shape:
            wrong.append(f"{name} {tuple(found.size)}, expected {tuple(tensor.shape)}")
    if wrong:
        more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
        raise unfit(checkpoint, ", ".join(wrong[:_MAX_LISTED]) + more)


def _fill(tree: Tree, checkpoint: Path, *, no_dist: bool = False) -> None:
    """Read the tensors. DCP tells every rank of a failure on any, so that all raise."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as `no_dist` asks
            dcp.load(dict(tree), checkpoint_id=checkpoint, no_dist=no_dist)
    except CheckpointException as error:
        raise damaged(checkpoint, str(failure_of(error))) from error
