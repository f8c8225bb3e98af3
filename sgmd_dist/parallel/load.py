"""Fills sharded parameters: each rank reads or computes its own slices, and no rank holds a whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sgmd_dist.errors import UserError

_MAX_LISTED = 5


@torch.no_grad()
def fill(module: nn.Module, value: Callable[[str, tuple[int, ...]], Tensor]) -> int:
    """Set every parameter from `value(name, global shape)`, one full tensor at a time; returns how many."""
    named = list(module.named_parameters())
    for name, parameter in named:
        local, slices = _local_part(parameter)
        local.copy_(value(name, tuple(parameter.shape))[slices])
    return len(named)


@torch.no_grad()
def load_safetensors(module: nn.Module, files: Sequence[Path]) -> int:
    """Copy this rank's slices of the parameters from `files`; returns the number of tensors loaded.

    Raises:
        UserError: missing, unexpected or mis-shaped keys, or an unreadable file; nothing is loaded then.
    """
    parameters = dict(module.named_parameters())
    handles = [(path, _open(path)) for path in files]
    where = {name: handle for _, handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dict)
    _check_names(parameters, where, files)
    for name, parameter in parameters.items():
        local, slices = _local_part(parameter)
        if local.numel():
            local.copy_(where[name].get_slice(name)[slices])
    return len(parameters)


def _local_part(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's storage of `parameter` and its place in the full tensor."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    mesh, placements = parameter.device_mesh, parameter.placements
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    slices = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    return parameter.to_local(), slices


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}; download the file again") from None


def _check_names(parameters: dict[str, nn.Parameter], where: dict[str, Any], files: Sequence[Path]) -> None:
    folder = files[0].parent if files else Path()
    wrong = [
        *_listed("missing", [name for name in parameters if name not in where]),
        *_listed("unexpected", [name for name in where if name not in parameters]),
        *_listed("of another shape", list(_mis_shaped(parameters, where))),
    ]
    if wrong:
        raise UserError(f"{folder}: the weights do not fit the network: {'; '.join(wrong)}; check its config.json")


def _mis_shaped(parameters: dict[str, nn.Parameter], where: dict[str, Any]) -> Iterator[str]:
    for name, parameter in parameters.items():
        if name in where:
            found = tuple(where[name].get_slice(name).get_shape())
            if found != tuple(parameter.shape):
                yield f"{name} {found}, expected {tuple(parameter.shape)}"


def _listed(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return [f"{len(names)} {kind} ({', '.join(names[:_MAX_LISTED])}{more})"]
