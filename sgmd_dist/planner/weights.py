"""What a role's weights and their training state take on a rank, from the network's shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from sgmd_dist.models.base import VideoModel
from sgmd_dist.planner.machine import Knobs
from sgmd_dist.recipe import Layout, Recipe

FLOAT32 = 4


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together: a block's, or those outside of blocks.

    `shard`: numbers on a rank. FSDP2 cuts every parameter along its first dim and fills the last shards up, so that all
    ranks hold as much as the first.
    """

    shard: int
    ranks: int

    @property
    def gathered(self) -> int:
        """Numbers of the whole unit, filled up."""
        return self.shard * self.ranks


@dataclass(frozen=True)
class Network:
    """A role's size on its ranks: `num_experts` networks of one architecture, of which a pass runs one.

    `root` and `blocks` are one expert's; `largest_shard`: numbers of the largest parameter's shard.
    """

    num_parameters: int
    num_tensors: int
    buffer_bytes: int
    largest_shard: int
    num_experts: int
    root: Unit
    blocks: tuple[Unit, ...]

    @property
    def shard(self) -> int:
        """Numbers on a rank, of all experts."""
        return self.num_experts * self.expert_shard

    @property
    def expert_shard(self) -> int:
        """Numbers on a rank, of what a pass runs."""
        return self.root.shard + sum(block.shard for block in self.blocks)

    @property
    def largest_block(self) -> Unit:
        return max(self.blocks, key=lambda block: block.shard)


def _network(model: VideoModel, ranks: int) -> Network:
    """The network's units on `ranks` ranks. Built on the meta device: nothing is allocated."""
    with torch.device("meta"):
        module = model.build()
    experts = model.networks(module)
    in_blocks = [list(block.parameters()) for block in model.blocks(experts[0])]
    taken = {id(p) for block in in_blocks for p in block}
    parameters = list(module.parameters())
    return Network(
        num_parameters=sum(p.numel() for p in parameters),
        num_tensors=len(parameters),
        buffer_bytes=sum(b.numel() * b.element_size() for b in module.buffers()),
        largest_shard=max(shard_numbers(p.shape, ranks) for p in parameters),
        num_experts=len(experts),
        root=_unit((p for p in experts[0].parameters() if id(p) not in taken), ranks),
        blocks=tuple(_unit(block, ranks) for block in in_blocks),
    )


def shard_numbers(shape: Iterable[int], ranks: int) -> int:
    """Numbers of a parameter on the rank that holds most of it: ceil(first dim / ranks) rows."""
    first, *rest = shape
    return -(-first // ranks) * prod(rest)


def _unit(parameters: Iterable[torch.Tensor], ranks: int) -> Unit:
    return Unit(sum(shard_numbers(p.shape, ranks) for p in parameters), ranks)


@dataclass(frozen=True)
class RoleBytes:
    """Bytes of one role on a GPU. `gradients` are there during the role's own phases only."""

    role: str
    num_parameters: int
    parameters: int
    gradients: int
    moments: int
    ema: int
    buffers: int
    on_host: int = 0

    @property
    def resident(self) -> int:
        """What stays on the GPU all the time."""
        return self.parameters + self.moments + self.ema + self.buffers

    @property
    def total(self) -> int:
        return self.resident + self.gradients


def networks_of(models: Mapping[str, VideoModel], layout: Layout) -> dict[str, Network]:
    """The roles' networks on the layout's ranks: replicas hold the same, ranks of a sequence share."""
    ranks = layout.dp_shard * layout.sequence_size
    known: dict[tuple[type, str], Network] = {}  # roles mostly share one architecture, and building it takes time
    for model in models.values():
        if _kind(model) not in known:
            known[_kind(model)] = _network(model, ranks)
    return {role: known[_kind(model)] for role, model in models.items()}


def _kind(model: VideoModel) -> tuple[type, str]:
    return type(model), repr(model.config)


def all_role_bytes(
    recipe: Recipe, trained: Mapping[str, bool], networks: Mapping[str, Network], knobs: Knobs
) -> dict[str, RoleBytes]:
    """Bytes of every role in `trained`, which says whether it is."""
    return {
        role: _role_bytes(
            recipe,
            role,
            networks[role],
            is_trained=is_trained,
            is_offloaded=knobs.teacher_offload and not is_trained,
        )
        for role, is_trained in trained.items()
    }


def _role_bytes(recipe: Recipe, role: str, network: Network, *, is_trained: bool, is_offloaded: bool) -> RoleBytes:
    """Bytes of `role`: weights in its dtype; for a trained role gradients and two moments in float32 with a step for
    each tensor, and the generator's average."""
    item = 2 if recipe.model.for_role(role).dtype == "bfloat16" else FLOAT32
    weights = item * network.shard
    state = FLOAT32 * network.shard if is_trained else 0
    return RoleBytes(
        role=role,
        num_parameters=network.num_parameters,
        parameters=0 if is_offloaded else weights,
        gradients=state,
        moments=2 * state + FLOAT32 * network.num_tensors * is_trained,
        ema=state if role == "generator" else 0,
        buffers=network.buffer_bytes,
        on_host=weights if is_offloaded else 0,
    )
