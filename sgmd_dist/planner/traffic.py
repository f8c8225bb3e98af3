"""Bytes that a GPU sends in an optimizer step, by kind of collective and axis of the mesh.

FSDP gathers every unit for each forward pass and, where it was given back, for each backward pass; a recomputation
runs inside the backward pass on the units that are there. Gradients of weights are reduced in float32 after each
micro-batch. A collective over n ranks counts what a ring algorithm sends: n - 1 shards for all-gather and
reduce-scatter, 2 (n - 1) / n of its numbers for all-reduce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sgmd_dist.layout import Layout
from sgmd_dist.models.base import VideoModel
from sgmd_dist.parallel.sequence import Partition, Traffic, traffic
from sgmd_dist.planner.machine import Knobs, Machine
from sgmd_dist.planner.passes import PlannedPasses, PlannedPhase
from sgmd_dist.planner.weights import FLOAT32, Network

Exchange = tuple[Traffic, Traffic]  # of one block for a micro-batch: forward, backward


@dataclass(frozen=True)
class Flow:
    """What a GPU sends in a step by one kind of collective over one axis.

    `hidden`: whether it runs beside the computation, as FSDP's do. `crosses_nodes`: whether its ranks lie on several.
    """

    kind: str
    axis: str
    sent_bytes: float
    seconds: float
    hidden: bool
    crosses_nodes: bool


@dataclass(frozen=True)
class _Axis:
    """A kind of collective and its axis. `span`: its ranks lie within so many consecutive ones; 0 for the host."""

    kind: str
    axis: str
    span: int
    hidden: bool


def step_flows(
    phases: Sequence[PlannedPhase],
    networks: Mapping[str, Network],
    exchanges: Mapping[str, Exchange],
    layout: Layout,
    machine: Machine,
    knobs: Knobs,
) -> list[Flow]:
    """All flows of a step, expected passes of all micro-batches; those that send nothing are left out."""
    shard, sequence = layout.dp_shard * layout.sequence_size, layout.sequence_size
    sent: dict[str, float] = {}
    for phase in phases:
        modules = dict.fromkeys(networks[planned.passes.role].module for planned in phase.passes)
        parts = [
            _sharding([p for p in phase.passes if networks[p.passes.role].module == module], networks, layout, knobs)
            for module in modules
        ]
        parts.append(_reduction(phase, networks[phase.role], layout))
        parts += [_sequence(planned, exchanges[planned.passes.role], sequence, knobs) for planned in phase.passes]
        for kind, size in (item for part in parts for item in part.items()):
            sent[kind] = sent.get(kind, 0.0) + size * layout.accumulation
    axes = (
        _Axis("all-gather", "dp_shard", shard, hidden=True),
        _Axis("all-gather again", "reshard_after_forward", knobs.kept_on or 1, hidden=True),
        _Axis("reduce-scatter", "dp_shard", shard, hidden=True),
        _Axis("all-reduce", "dp_replicate", shard * layout.dp_replicate, hidden=True),
        _Axis("all-to-all", "ulysses", layout.ulysses, hidden=False),
        _Axis("ring hops", "ring", sequence, hidden=True),
        _Axis("output gather", "ring x ulysses", sequence, hidden=False),
        _Axis("host copy", "teacher_offload", 0, hidden=True),
    )
    return [_flow(axis, sent[axis.kind], machine) for axis in axes if sent.get(axis.kind)]


def exchange_of(model: VideoModel, partition: Partition, *, batch: int, item_bytes: int) -> Exchange:
    """What one block of `model` exchanges (forward, backward) for a batch of one pass."""
    shape = model.attention_shape()
    return traffic(partition, batch=batch, heads=shape.num_heads, head_size=shape.head_size, item_bytes=item_bytes)


def _sharding(
    passes: Sequence[PlannedPasses], networks: Mapping[str, Network], layout: Layout, knobs: Knobs
) -> dict[str, float]:
    """What FSDP sends to gather one module for its passes of a micro-batch in one phase.

    Several graphs share a backward pass: the root stays gathered until an input's gradient is done, or to the end.
    Blocks that are not given back to all ranks are gathered from all once, and from then on from the ranks that keep
    them.
    """
    ranks, network = layout.dp_shard * layout.sequence_size, networks[passes[0].passes.role]
    forwards = sum(p.passes.mean for p in passes)
    to_input, to_weights = (sum(p.passes.mean for p in passes if p.passes.gradient == g) for g in ("input", "weights"))
    graphs = to_input + to_weights
    gathers = forwards + graphs
    whole = gathers if knobs.kept_on is None else min(gathers, 1.0)
    blocks = network.blocks_shard
    own = knobs.compute_bytes * ((forwards + to_input + min(1.0, to_weights)) * network.root.shard + whole * blocks)
    kept_on = knobs.kept_on or 1
    return {
        "all-gather": own * (ranks - 1),
        "all-gather again": knobs.compute_bytes * (gathers - whole) * ranks * blocks * (1 - 1 / kept_on),
        "host copy": own if knobs.teacher_offload and passes[0].passes.role == "teacher" else 0.0,
    }


def _reduction(phase: PlannedPhase, network: Network, layout: Layout) -> dict[str, float]:
    """What FSDP sends to reduce a micro-batch's gradients of what the phase trains: where several graphs add to them,
    when the last has."""
    ranks, replicas = layout.dp_shard * layout.sequence_size, layout.dp_replicate
    reductions = min(1.0, sum(p.passes.mean for p in phase.passes if p.passes.gradient == "weights"))
    return {
        "reduce-scatter": FLOAT32 * reductions * (ranks - 1) * network.expert_shard,
        "all-reduce": FLOAT32 * reductions * 2 * (replicas - 1) / replicas * network.expert_shard,
    }


def _sequence(planned: PlannedPasses, exchange: Exchange, ranks: int, knobs: Knobs) -> dict[str, float]:
    """What the ranks of a sequence send for one pass: blocks exchange for each sample, and the output is gathered."""
    count, backward = planned.passes.mean, int(planned.passes.gradient != "none")
    exchanges = 1 + backward * int(knobs.checkpointing != "none")
    rings = 1 + backward * int(knobs.checkpointing == "block")  # selective checkpointing keeps what the ring made
    blocks = count * planned.costs.num_blocks * planned.passes.batch
    one, back = exchange
    gathered = count * planned.costs.output_numbers * (knobs.compute_bytes + backward * FLOAT32)
    return {
        "all-to-all": blocks * (exchanges * one.all_to_all_bytes + backward * back.all_to_all_bytes),
        "ring hops": blocks * (rings * one.hop_bytes + backward * back.hop_bytes),
        "output gather": (ranks - 1) * gathered,
    }


def _flow(axis: _Axis, sent: float, machine: Machine) -> Flow:
    bandwidth = machine.bandwidth(axis.span) if axis.span else 1e9 * machine.host_bandwidth
    return Flow(axis.kind, axis.axis, sent, sent / bandwidth, axis.hidden, axis.span > machine.gpus_per_node)
