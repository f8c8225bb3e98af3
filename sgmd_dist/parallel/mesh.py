"""Process groups and the device mesh of a run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group

from sgmd_dist.errors import UserError
from sgmd_dist.layout import Layout

TIMEOUT_S = 1800.0
_LAUNCHER_SETS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a sequence, by the names of their process groups, and this rank's place among them.

    Tokens follow the ranks' order: rank = ring rank x `ulysses` + ulysses rank. `whole` has all ring x ulysses ranks,
    `ulysses_name` those of this ring rank, `ring_name` those of this ulysses rank.
    """

    rank: int
    ring: int
    ulysses: int
    whole: str
    ring_name: str
    ulysses_name: str


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `fsdp` is the mesh over which parameters lie: (dp_shard,) or (dp_replicate, dp_shard),
    where the shards lie over the ranks of a sequence too.

    `dp_rank` numbers the ranks that read different data, `dp_size` of them; the ranks of one `sequence` read the same.
    """

    layout: Layout
    device: torch.device
    rank: int
    fsdp: DeviceMesh
    dp_rank: int
    sequence: SequenceGroup | None = None

    @property
    def dp_size(self) -> int:
        return self.layout.dp_size

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to people."""
        return self.rank == 0


def world_size() -> int:
    """The number of ranks that the launcher started; 1 without a launcher.

    Raises:
        UserError: the environment is half a launcher's.
    """
    return int(os.environ["WORLD_SIZE"]) if _is_launched() else 1


def _is_launched() -> bool:
    """True under torchrun, or whatever sets the same variables."""
    if "RANK" not in os.environ:
        return False
    if missing := [name for name in _LAUNCHER_SETS if name not in os.environ]:
        raise UserError(
            f"environment: RANK = {os.environ['RANK']} is set and {', '.join(missing)} not; start with torchrun, or"
            " unset RANK to train in one process"
        )
    return True


@contextmanager
def process_group(timeout_s: float = TIMEOUT_S) -> Iterator[torch.device]:
    """Join the launcher's process group for the length of the context; yields this rank's device.

    Without a launcher (`python launch/train.py`) the group has this process alone. CUDA ranks also get a gloo
    group for CPU tensors.

    Args:
        timeout_s: after which a collective that some rank does not join fails on the others.

    Raises:
        UserError: the environment is half a launcher's, or there are more ranks than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    is_launched = _is_launched()
    if use_cuda:
        if local_rank >= (num_gpus := torch.cuda.device_count()):
            raise UserError(f"environment: LOCAL_RANK = {local_rank}, with {num_gpus} GPUs; start one rank per GPU")
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if is_launched:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        gc.collect()  # gloo aborts at interpreter exit while a mesh still holds a group
        dist.destroy_process_group()


def build_mesh(layout: Layout, device: torch.device) -> Mesh:
    """The mesh of `layout` over the initialized default process group."""
    assert dist.get_world_size() == layout.world_size, "the layout is for another number of ranks"
    shard_size = layout.dp_shard * layout.sequence_size
    if layout.dp_replicate == 1:
        fsdp = init_device_mesh(device.type, (shard_size,), mesh_dim_names=("dp_shard",))
    else:
        sizes = (layout.dp_replicate, shard_size)
        fsdp = init_device_mesh(device.type, sizes, mesh_dim_names=("dp_replicate", "dp_shard"))
    rank = dist.get_rank()
    return Mesh(layout, device, rank, fsdp, rank // layout.sequence_size, _sequence_group(layout))


def process_group_of(name: str) -> ProcessGroup:
    """The process group that a `SequenceGroup` names."""
    group_name: Any = name
    return _resolve_process_group(group_name)


def _sequence_group(layout: Layout) -> SequenceGroup | None:
    """The groups of ranks that share a sequence; None where each rank has its own. Collective."""
    ring, ulysses, size = layout.ring, layout.ulysses, layout.sequence_size
    if size == 1:
        return None
    ranks = torch.arange(layout.world_size).view(-1, ring, ulysses)
    whole = _join(ranks.flatten(1))
    return SequenceGroup(
        rank=dist.get_rank() % size,
        ring=ring,
        ulysses=ulysses,
        whole=whole,
        ring_name=whole if ulysses == 1 else _join(ranks.transpose(1, 2).reshape(-1, ring)),
        ulysses_name=whole if ring == 1 else _join(ranks.reshape(-1, ulysses)),
    )


def _join(ranks: torch.Tensor) -> str:
    """Make a process group of each row; returns the name of this rank's. Who keeps the group itself delays its end."""
    group, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
    assert isinstance(group, ProcessGroup)
    return group.group_name
