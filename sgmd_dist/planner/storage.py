"""Host memory and disk that a run needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sgmd_dist.planner.machine import Knobs, Machine
from sgmd_dist.planner.weights import FLOAT32, Network, RoleBytes
from sgmd_dist.recipe import Recipe


@dataclass(frozen=True)
class Storage:
    """Bytes outside of the GPUs.

    Attributes:
        loading: extra on a rank's host while weights load: its slice of the largest tensor.
        staging: a rank's copy of its state during an asynchronous save.
        offloaded: a rank's shards that live on the host.
        node: all of these for a node's ranks at once.
        checkpoint: one checkpoint on disk.
        checkpoints: all that are there at once, while a new one is written beside those that are kept.
        export: the generator as a float32 diffusers folder.
    """

    loading: int
    staging: int
    offloaded: int
    node: int
    checkpoint: int
    checkpoints: int
    export: int


def storage_of(
    recipe: Recipe,
    machine: Machine,
    roles: Mapping[str, RoleBytes],
    networks: Mapping[str, Network],
    knobs: Knobs,
) -> Storage:
    """Host memory and disk of a run: weights, both moments and each tensor's step of the trained roles, and the
    generator's average, in float32."""
    trained = [role for role in roles.values() if role.moments]
    loading = FLOAT32 * max(network.largest_shard for network in networks.values())
    staging = sum(role.parameters + role.moments + role.ema for role in trained) if knobs.asynchronous_saves else 0
    offloaded = sum(role.on_host for role in roles.values())
    copies = {role.role: 3 + (role.ema > 0) for role in trained}
    checkpoint = FLOAT32 * sum(
        count * networks[role].num_parameters + networks[role].num_tensors for role, count in copies.items()
    )
    return Storage(
        loading=loading,
        staging=staging,
        offloaded=offloaded,
        node=machine.gpus_per_node * (loading + staging + offloaded),
        checkpoint=checkpoint,
        checkpoints=checkpoint * (recipe.checkpoint.keep + 1),
        export=FLOAT32 * networks["generator"].num_parameters,
    )
