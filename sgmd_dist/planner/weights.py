"""What a role's weights and their training state take on a rank, from the network's shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from sgmd_dist import adapters, heads
from sgmd_dist.assemble import NetworkPlan
from sgmd_dist.layout import Layout
from sgmd_dist.planner.machine import Knobs

FLOAT32 = 4
BASE = "base"  # in the place of a role: the frozen network that only adapters share


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
    """What a role runs and what of it is its own, on its ranks.

    Attributes:
        module: the same for roles that share a network.
        num_experts: networks of one architecture, of which a pass runs one.
        root, blocks: an expert as it is gathered, with every adapter on it.
        is_adapter: whether the role's own is an adapter, and not the whole network.
        num_parameters, num_tensors, shard: its own; numbers on a rank for the last.
        item_bytes: of one of its own numbers.
        largest_shard: numbers of its own largest parameter's shard.
        trained_block: its own numbers in the largest block, gathered.
        buffer_bytes: of the network, where the role brings it.
    """

    module: int
    num_experts: int
    root: Unit
    blocks: tuple[Unit, ...]
    is_adapter: bool
    num_parameters: int
    num_tensors: int
    shard: int
    item_bytes: int
    largest_shard: int
    trained_block: int
    buffer_bytes: int

    @property
    def expert_shard(self) -> int:
        """Its own numbers on a rank in what a pass runs."""
        return self.shard // self.num_experts

    @property
    def blocks_shard(self) -> int:
        """Numbers of an expert's blocks on a rank."""
        return sum(block.shard for block in self.blocks)

    @property
    def largest_block(self) -> Unit:
        return max(self.blocks, key=lambda block: block.shard)


def networks_of(plans: Sequence[NetworkPlan], layout: Layout) -> dict[str, Network]:
    """The roles' networks on the layout's ranks, and `BASE` where adapters alone share one: replicas hold the same,
    ranks of a sequence share. Built on the meta device: nothing is allocated."""
    ranks = layout.dp_shard * layout.sequence_size
    built: dict[tuple[object, ...], nn.Module] = {}  # roles mostly share one architecture, and building it takes time
    networks: dict[str, Network] = {}
    for number, plan in enumerate(plans):
        kind = (type(plan.model), repr(plan.model.config), repr(plan.head), *plan.loras.items())
        if kind not in built:
            built[kind] = _build(plan)
        roles = plan.roles if None in plan.roles.values() else {BASE: None, **plan.roles}
        networks |= {role: _network(built[kind], plan, role, number, ranks) for role in roles}
    return networks


def _build(plan: NetworkPlan) -> nn.Module:
    with torch.device("meta"):
        module = plan.model.build()
        if plan.head is not None:
            heads.inject(module, plan.model, plan.head)
    for role, lora in plan.loras.items():
        adapters.inject(module, role, lora)
    return module


def _network(module: nn.Module, plan: NetworkPlan, role: str, number: int, ranks: int) -> Network:
    is_adapter = role in plan.loras
    own = adapters.adapter_parameters(module, role) if is_adapter else adapters.base_parameters(module)
    experts = plan.model.networks(module)
    in_blocks = [list(block.parameters()) for block in plan.model.blocks(experts[0])]
    taken = {id(p) for block in in_blocks for p in block}
    shards = [shard_numbers(p.shape, ranks) for p in own.values()]
    return Network(
        module=number,
        num_experts=len(experts),
        root=_unit((p for p in experts[0].parameters() if id(p) not in taken), ranks),
        blocks=tuple(_unit(block, ranks) for block in in_blocks),
        is_adapter=is_adapter,
        num_parameters=sum(p.numel() for p in own.values()),
        num_tensors=len(own),
        shard=sum(shards),
        item_bytes=2 if plan.dtype == "bfloat16" and not is_adapter else FLOAT32,
        largest_shard=max(shards),
        trained_block=_own_in_blocks(in_blocks, {id(p) for p in own.values()}, ranks),
        buffer_bytes=0 if is_adapter else sum(b.numel() * b.element_size() for b in module.buffers()),
    )


def _own_in_blocks(blocks: Iterable[Iterable[torch.Tensor]], own: Collection[int], ranks: int) -> int:
    return max(_unit((p for p in block if id(p) in own), ranks).gathered for block in blocks)


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


def all_role_bytes(trained: Mapping[str, bool], networks: Mapping[str, Network], knobs: Knobs) -> dict[str, RoleBytes]:
    """Bytes of every role's own; `trained` says which are."""
    return {
        role: _role_bytes(
            role, network, is_trained=trained.get(role, False), is_offloaded=knobs.teacher_offload and role == "teacher"
        )
        for role, network in networks.items()
    }


def _role_bytes(role: str, network: Network, *, is_trained: bool, is_offloaded: bool) -> RoleBytes:
    """Bytes of `role`: weights in their dtype; for a trained role gradients and two moments in float32 with a step for
    each tensor, and the generator's average."""
    weights = network.item_bytes * network.shard
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
