"""Checkpoints: torch DCP folders that appear whole or not at all, and load at any world size.

    checkpoints/step-00001000/    .metadata  __*.distcp  meta.json  recipe.yaml

A save writes into `step-00001000.tmp`; the rename that commits it comes last, and older checkpoints and what killed
saves left are pruned only after it. Tensors are DTensors or replicated, never one rank's own; there is no
random-number state.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from loguru import logger
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Shard

from sgmd_dist import __version__
from sgmd_dist.checksum import sum_of_bits, wrap
from sgmd_dist.durable import sync_folder, write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.roles import Role, Roles

FOLDER = "checkpoints"
RECIPE_FILE = "recipe.yaml"
_META_FILE = "meta.json"
_NAME = re.compile(r"step-(\d{8})")
_LEFTOVER = re.compile(r"step-\d{8}\.(tmp|replaced)")
_MAX_LISTED = 5

Tree = dict[str, dict[str, Tensor]]  # "generator", "generator.optimizer", "generator.ema", ... -> name -> tensor


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself. `checksums`: per tree, the sum of its tensors' bits, modulo 2^64."""

    step: int
    stream: dict[str, Any]
    num_tensors: dict[str, int]
    checksums: dict[str, int]
    versions: dict[str, str] = field(default_factory=lambda: {"sgmd_dist": __version__, "torch": torch.__version__})


def committed(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run folder, oldest first."""
    folder = run_dir / FOLDER
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(path for path in found if _NAME.fullmatch(path.name) and (path / _META_FILE).exists())


def find(where: str | Path) -> Path:
    """The checkpoint that `where` names: itself, or the newest committed one of a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(where)
    if (path / _META_FILE).exists():
        return path
    found = committed(path)
    if not found:
        raise UserError(f"{path}: expected a checkpoint or a run folder with a committed one in {path / FOLDER}")
    return found[-1]


def read_meta(checkpoint: Path) -> Meta:
    """The checkpoint's own description.

    Raises:
        UserError: meta.json is damaged.
    """
    path = checkpoint / _META_FILE
    try:
        meta = Meta(**json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(meta.step, int) or set(meta.num_tensors) != set(meta.checksums):
            raise ValueError("its fields do not fit each other")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is not a checkpoint's description ({error}); use another checkpoint") from None
    return meta


def training_state(roles: Roles) -> Tree:
    """Every tensor that a resumed run needs, by tree and name; views of the live ones, so loading fills them."""
    tree: Tree = {}
    for role in roles.trained:
        tree[role.name] = {name: p.detach() for name, p in role.parameters.items()}
        tree[f"{role.name}.optimizer"] = _optimizer_tensors(role)
        if role.ema is not None:
            tree[f"{role.name}.ema"] = role.ema.shadow
    return tree


def _optimizer_tensors(role: Role) -> dict[str, Tensor]:
    """AdamW's step and moments per parameter; an optimizer that never stepped gets the zeros it would start with."""
    assert role.optimizer is not None
    tensors: dict[str, Tensor] = {}
    for name, parameter in role.parameters.items():
        state = role.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors.update({f"{name}.{key}": value for key, value in state.items()})
    return tensors


def save(run_dir: Path, roles: Roles, *, step: int, stream: dict[str, Any], recipe: str, keep: int) -> Path:
    """Write and commit the checkpoint of `step`, then prune all but the newest `keep` up to it. Collective.

    Checkpoints of later steps, from which nothing continues when a run goes back to an earlier one, stay.

    Args:
        stream: the loader's state, equal on all ranks.
        recipe: the resolved recipe as YAML.

    Raises:
        UserError: a tensor is not finite; on every rank, and nothing is written.
    """
    final = run_dir / FOLDER / f"step-{step:08d}"
    aside = final.with_suffix(".tmp")
    is_main = dist.get_rank() == 0
    if is_main and aside.exists():
        shutil.rmtree(aside)
    dist.barrier()
    tree = training_state(roles)
    _refuse_diverged(tree, run_dir, step)
    meta = Meta(step, stream, {name: len(part) for name, part in tree.items()}, checksums(tree))
    dcp.save(tree, checkpoint_id=aside)
    if is_main:
        write_durably(aside / RECIPE_FILE, recipe.encode())
        write_durably(aside / _META_FILE, json.dumps(asdict(meta), indent=1).encode())
        _commit(aside, final)
        _prune(run_dir, final, keep)
        logger.info("saved {}", final)
    dist.barrier()
    return final


def _refuse_diverged(tree: Tree, run_dir: Path, step: int) -> None:
    """Commit no weights that are not numbers: good checkpoints would be pruned for them."""
    local = [_local(tensor) for tensors in tree.values() for tensor in tensors.values()]
    finite = torch.tensor(int(all(bool(tensor.isfinite().all()) for tensor in local)))
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if not finite:
        raise UserError(
            f"{run_dir}: training diverged: weights of step {step} are not finite and are not saved; lower"
            " optim.*.lr, and continue from the newest checkpoint"
        )


def load(checkpoint: Path, roles: Roles) -> Meta:
    """Fill networks, optimizers and EMA from `checkpoint`, at any world size. Collective; before any backward.

    Raises:
        UserError: the checkpoint is damaged or is of other networks; nothing should be trained then.
    """
    meta = read_meta(checkpoint)
    tree = training_state(roles)
    expected = {name: len(part) for name, part in tree.items()}
    if expected != meta.num_tensors:
        raise UserError(
            f"{checkpoint}: holds tensors {meta.num_tensors}, this recipe trains {expected}; resume with the recipe in"
            f" {checkpoint / RECIPE_FILE} or set run.resume=never"
        )
    _fill(tree, checkpoint)
    found = checksums(tree)
    if found != meta.checksums:
        raise UserError(_damaged(checkpoint, f"checksums {found}, expected {meta.checksums}"))
    return meta


def load_tree(checkpoint: Path, name: str, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """One tree of a checkpoint as full float32 tensors on the CPU, in one process without a process group.

    Raises:
        UserError: the checkpoint has no such tree, or is damaged.
    """
    meta = read_meta(checkpoint)
    if name not in meta.num_tensors:
        raise UserError(f"{checkpoint}: holds no '{name}'; it has {', '.join(meta.num_tensors)}")
    if meta.num_tensors[name] != len(shapes):
        raise UserError(_unfit(checkpoint, f"'{name}' has {meta.num_tensors[name]} tensors, expected {len(shapes)}"))
    tensors = {key: torch.empty(shape, dtype=torch.float32) for key, shape in shapes.items()}
    _fill({name: tensors}, checkpoint, no_dist=True)
    if _bits({name: tensors}) != {name: meta.checksums[name]}:
        raise UserError(_damaged(checkpoint, f"the checksum of '{name}' differs"))
    return tensors


def checksums(tree: Tree) -> dict[str, int]:
    """Per tree, the sum over all elements of their bits as integers, modulo 2^64: equal for every sharding."""
    local = _bits(tree)
    total = torch.tensor(list(local.values()), dtype=torch.int64)
    dist.all_reduce(total)  # the default group has a CPU backend beside NCCL
    return dict(zip(local, total.tolist(), strict=True))


def _bits(tree: Tree) -> dict[str, int]:
    return {name: wrap(sum(_tensor_bits(tensor) for tensor in part.values())) for name, part in tree.items()}


def _tensor_bits(tensor: Tensor) -> int:
    if isinstance(tensor, DTensor):
        if not _owns(tensor):
            return 0
        tensor = tensor.to_local()
    elif dist.is_initialized() and dist.get_rank() != 0:
        return 0  # replicated: counted once
    return sum_of_bits(tensor)


def _owns(tensor: DTensor) -> bool:
    """True on one rank of those that hold the same slice."""
    mesh = tensor.device_mesh
    return all(
        isinstance(placement, Shard) or mesh.get_local_rank(dim) == 0 for dim, placement in enumerate(tensor.placements)
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fill(tree: Tree, checkpoint: Path, *, no_dist: bool = False) -> None:
    _check_shapes(tree, checkpoint)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as `no_dist` asks
            dcp.load(dict(tree), checkpoint_id=checkpoint, no_dist=no_dist)
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        why = " ".join(str(cause).split()).partition(". ")[0]  # torch goes on with advice that is none here
        raise UserError(_damaged(checkpoint, f"{type(cause).__name__} {why}".strip())) from error


def _check_shapes(tree: Tree, checkpoint: Path) -> None:
    """Compare names and shapes with the checkpoint's own list, which DCP would log traces about."""
    try:
        saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # whatever unpickling damaged bytes raises
        raise UserError(_damaged(checkpoint, f"its .metadata cannot be read ({error})")) from error
    wrong: list[str] = []
    for name, tensor in ((f"{part}.{key}", t) for part, tensors in tree.items() for key, t in tensors.items()):
        found = saved.get(name)
        if not isinstance(found, TensorStorageMetadata):
            wrong.append(f"no {name}")
        elif found.size != tensor.shape:
            wrong.append(f"{name} {tuple(found.size)}, expected {tuple(tensor.shape)}")
    if wrong:
        more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
        raise UserError(_unfit(checkpoint, ", ".join(wrong[:_MAX_LISTED]) + more))


def _unfit(checkpoint: Path, why: str) -> str:
    return f"{checkpoint}: is of another network: {why}; use the model that {checkpoint / RECIPE_FILE} names"


def _damaged(checkpoint: Path, why: str) -> str:
    return f"{checkpoint}: is damaged: {why}; remove this folder to continue from the checkpoint before it"


def _commit(aside: Path, final: Path) -> None:
    sync_folder(aside)
    if final.exists():  # a run resumed from before this step; the old one stays until the new one is complete
        _set_aside(final)
    aside.rename(final)
    sync_folder(final.parent)


def _set_aside(checkpoint: Path) -> None:
    """Take back a commit: `_prune` removes what this leaves, also after a kill in between."""
    replaced = checkpoint.with_suffix(".replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    checkpoint.rename(replaced)


def _prune(run_dir: Path, newest: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints up to `newest`, and the leftovers of killed saves."""
    for old in [path for path in committed(run_dir) if path.name <= newest.name][:-keep]:
        _set_aside(old)
    for leftover in (run_dir / FOLDER).iterdir():
        if _LEFTOVER.fullmatch(leftover.name):
            shutil.rmtree(leftover)
