"""Fills sharded parameters: each rank reads or computes its own slices, and no rank holds a whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sgmd_dist.checksum import sum_of_bits, wrap
from sgmd_dist.errors import UserError
from sgmd_dist.shard import counts_here, local

_MAX_LISTED = 5


@dataclass(frozen=True)
class Loaded:
    """What parameters were filled with: how many, and over all ranks their bytes in the files and the sum of their
    bits there, which is the same for every sharding."""

    num_tensors: int
    num_bytes: int
    checksum: int


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], value: Callable[[str, tuple[int, ...]], Tensor]) -> int:
    """Set each of `parameters` from `value(name, global shape)`, one full tensor at a time; returns how many."""
    for name, parameter in parameters.items():
        part, slices = _local_part(parameter)
        part.copy_(value(name, tuple(parameter.shape))[slices])
    return len(parameters)


@torch.no_grad()
def load_safetensors(
    parameters: Mapping[str, Tensor], files: Mapping[str, Sequence[Path]], unused: Sequence[str] = ()
) -> Loaded:
    """Copy this rank's slices of `parameters` from `files`, one slice at a time. Collective in a process group.

    Args:
        parameters: by name, sharded or whole.
        files: by prefix: the parameter `prefix + name` is the tensor `name` of one of these files.
        unused: tensors with one of these in their names are not asked for a parameter.

    Raises:
        UserError: missing, unexpected or mis-shaped keys, or an unreadable file; nothing is loaded then.
    """
    there = {prefix + name: found for prefix, paths in files.items() for name, found in _tensors(paths).items()}
    where = {n: found for n, found in there.items() if n in parameters or not any(part in n for part in unused)}
    _check_names(parameters, where, files)
    num_bytes = checksum = 0
    for name, parameter in parameters.items():
        part, slices = _local_part(parameter)
        if part.numel():
            found = where[name][slices]
            part.copy_(found)
            if counts_here(parameter):
                num_bytes += found.nbytes
                checksum += sum_of_bits(found)
    total = torch.tensor([num_bytes, wrap(checksum)])
    if dist.is_initialized():
        dist.all_reduce(total)
    return Loaded(len(parameters), *total.tolist())


def _tensors(paths: Sequence[Path]) -> dict[str, Any]:
    """The files' tensors by name, to be sliced; none is read yet."""
    handles = [_open(path) for path in paths]
    return {name: handle.get_slice(name) for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dict)


def _local_part(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's storage of `parameter` and its place in the full tensor."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    mesh, placements = parameter.device_mesh, parameter.placements
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    slices = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    return local(parameter), slices


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}; download the file again") from None


def _check_names(
    parameters: Mapping[str, Tensor], where: Mapping[str, Any], files: Mapping[str, Sequence[Path]]
) -> None:
    wrong = [
        *_listed("missing", [name for name in parameters if name not in where]),
        *_listed("unexpected", [name for name in where if name not in parameters]),
        *_listed("of another shape", list(_mis_shaped(parameters, where))),
    ]
    if wrong:
        folders = ", ".join(dict.fromkeys(str(path.parent) for paths in files.values() for path in paths))
        raise UserError(f"{folders}: the weights do not fit the network: {'; '.join(wrong)}; check its config.json")


def _mis_shaped(parameters: Mapping[str, Tensor], where: Mapping[str, Any]) -> Iterator[str]:
    for name, parameter in parameters.items():
        if name in where:
            found = tuple(where[name].get_shape())
            if found != tuple(parameter.shape):
                yield f"{name} {found}, expected {tuple(parameter.shape)}"


def _listed(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return [f"{len(names)} {kind} ({', '.join(names[:_MAX_LISTED])}{more})"]
