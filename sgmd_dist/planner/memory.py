"""The most that a GPU holds in each phase of a step: weights, activations, and what FSDP has gathered at that moment.

A graph lives from its forward pass until the phase's backward pass reaches it, which comes when all the phase's passes
have run; it goes backward in reverse order. With checkpointing a graph is its blocks' inputs, and one block at a time
is recomputed. FSDP2 holds, in the compute dtype,

    forward     the root and a block, the buffer that the block was copied from, and the blocks gathered ahead (one, or
                `forward_prefetch`)
    backward    the root, a block and `backward_prefetch` more; where weights are trained the block's gradients too, and
                the float32 buffer in which those of the block before are reduced

and besides, where several graphs train the same weights, the gradients of all blocks of those that have run backward:
they are reduced when the last one has added its own. Where `reshard_after_forward` leaves blocks gathered, each
network's are held until the phase ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sgmd_dist.models.base import ActivationBytes, Gradient
from sgmd_dist.planner.machine import Knobs
from sgmd_dist.planner.passes import PlannedPasses, PlannedPhase
from sgmd_dist.planner.weights import FLOAT32, Network, RoleBytes

# Tensors of a micro-batch's latents in float32 that a phase holds beside the networks: noise, x_sigma, x_g, velocities,
# both x0-predictions and what the losses make of them.
LATENT_COPIES = 16


@dataclass(frozen=True)
class Moment:
    """What a GPU holds at one moment of a phase, in bytes. `what` names the moment."""

    what: str
    activations: int
    gathered: int
    reducing: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gathered + self.reducing


@dataclass(frozen=True)
class PhaseMemory:
    """The fullest moment of a phase. `state`: all roles' resident bytes and the gradients of the phase's role;
    `samples`: latents and text of the micro-batch, and samples kept for reuse."""

    role: str
    state: int
    samples: int
    moment: Moment

    @property
    def peak(self) -> int:
        return self.state + self.samples + self.moment.total


def phase_memory(
    phase: PlannedPhase,
    roles: Mapping[str, RoleBytes],
    networks: Mapping[str, Network],
    knobs: Knobs,
    *,
    sample_bytes: int,
    kept_bytes: int,
) -> PhaseMemory:
    """The peak of one phase.

    Args:
        sample_bytes: latents of a micro-batch in float32.
        kept_bytes: samples and texts of a whole step that later phases reuse.
    """
    state = sum(role.resident for role in roles.values()) + roles[phase.role].gradients
    moments = _moments(phase.passes, networks, knobs)
    fullest = max(moments, key=lambda moment: moment.total)
    return PhaseMemory(phase.role, state, LATENT_COPIES * sample_bytes + kept_bytes, fullest)


def _moments(passes: Sequence[PlannedPasses], networks: Mapping[str, Network], knobs: Knobs) -> list[Moment]:
    """Every moment that may be the fullest: each pass's forward, and each graph's backward."""
    alive, moments = 0, []
    graphs: list[tuple[PlannedPasses, int]] = []
    kept: dict[int, int] = {}  # blocks' parameters that stay gathered, by module
    for planned in (planned for planned in passes if planned.passes.most):
        role, gradient, activations = planned.passes.role, planned.passes.gradient, planned.costs.activations
        inside = activations.block_forward
        if gradient == "none":
            inside += activations.shared + activations.modulations + activations.block_input
        else:
            graph = graph_bytes(activations, planned.costs.num_blocks, gradient, knobs.checkpointing)
            alive += graph * planned.passes.most
            graphs += [(planned, graph)] * planned.passes.most
        kept[networks[role].module] = _kept(networks[role], knobs)
        gathered = sum(kept.values()) + _gathered(networks[role], knobs, 2 + max(knobs.forward_prefetch, 1))
        moments.append(Moment(f"{role} forward", alive + inside, gathered))
    ended: set[str] = set()
    for planned, graph in reversed(graphs):
        role, network = planned.passes.role, networks[planned.passes.role]
        moments.append(_backward(planned, alive, network, knobs, sum(kept.values())))
        alive -= graph
        if planned.passes.gradient == "weights" and role not in ended and _num_trained(graphs, role) > 1:
            alive += knobs.compute_bytes * len(network.blocks) * network.trained_block
        ended.add(role)
    return moments


def _num_trained(graphs: Sequence[tuple[PlannedPasses, int]], role: str) -> int:
    return sum(planned.passes.role == role and planned.passes.gradient == "weights" for planned, _ in graphs)


def _backward(planned: PlannedPasses, alive: int, network: Network, knobs: Knobs, kept: int) -> Moment:
    """While the last block is recomputed and run backward."""
    role, gradient, activations = planned.passes.role, planned.passes.gradient, planned.costs.activations
    which = _which(gradient)
    inside = activations.block_backward[which]
    if knobs.checkpointing != "none":
        inside += activations.block_saved[which]
    if knobs.checkpointing == "selective":
        inside -= activations.attention
    reducing = (knobs.compute_bytes + FLOAT32) * network.trained_block if gradient == "weights" else 0
    return Moment(
        f"{role} backward", alive + inside, kept + _gathered(network, knobs, 1 + knobs.backward_prefetch), reducing
    )


def graph_bytes(activations: ActivationBytes, num_blocks: int, gradient: Gradient, checkpointing: str) -> int:
    """What one pass's graph keeps until its backward pass."""
    which = _which(gradient)
    block = {
        "none": activations.input_saved + activations.block_saved[which],
        "selective": activations.block_input + activations.attention,
        "block": activations.block_input,
    }[checkpointing]
    modulations = 0 if checkpointing == "none" else activations.modulations
    return num_blocks * block + activations.shared + modulations + activations.rest_saved[which]


def _gathered(network: Network, knobs: Knobs, num_blocks: int) -> int:
    blocks = min(num_blocks, len(network.blocks) + 1)
    return knobs.compute_bytes * (network.root.gathered + blocks * network.largest_block.gathered)


def _kept(network: Network, knobs: Knobs) -> int:
    """What `reshard_after_forward` leaves of the blocks on a rank after their forward pass."""
    if knobs.kept_on is None:
        return 0
    return knobs.compute_bytes * sum(block.gathered for block in network.blocks) // knobs.kept_on


def _which(gradient: Gradient) -> int:
    return {"input": 0, "weights": 1}[gradient]
