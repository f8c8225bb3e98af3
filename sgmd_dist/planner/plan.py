"""The plan of a run: everything that follows from the recipe, the networks' shapes and the machine. No weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from sgmd_dist import heads
from sgmd_dist.assemble import build_architecture, build_objective, plan_networks
from sgmd_dist.data.sources import latent_shape_of
from sgmd_dist.layout import Layout
from sgmd_dist.models.base import LatentShape, PassCosts, PassShape, VideoModel
from sgmd_dist.objectives.base import Phase
from sgmd_dist.parallel.sequence import Partition
from sgmd_dist.planner.machine import Machine, knobs_of
from sgmd_dist.planner.memory import PhaseMemory, phase_memory
from sgmd_dist.planner.passes import PlannedPasses, PlannedPhase, StepFlops, sample_passes, step_flops
from sgmd_dist.planner.storage import Storage, storage_of
from sgmd_dist.planner.traffic import Flow, exchange_of, step_flows
from sgmd_dist.planner.weights import FLOAT32, RoleBytes, all_role_bytes, networks_of
from sgmd_dist.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """What a run needs; bytes, FLOPs and seconds are those of one GPU and one optimizer step.

    Attributes:
        passes: per sample of the batch by role, (in expectation, at most), as `Role.passes` counts them.
        roles: bytes by role.
        planned: the phases that differ from each other, with their passes and what one of them costs.
        phases: the fullest moment of each of them.
        flows: communication by kind and axis.
        compute_seconds: FLOPs at the machine's share of its peak.
    """

    recipe: str
    step: int
    machine: Machine
    layout: Layout
    latent_shape: LatentShape
    tokens: int
    passes: dict[str, tuple[float, int]]
    roles: tuple[RoleBytes, ...]
    planned: tuple[PlannedPhase, ...]
    phases: tuple[PhaseMemory, ...]
    flops: StepFlops
    flows: tuple[Flow, ...]
    storage: Storage

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.machine.usable_bytes

    @property
    def compute_seconds(self) -> float:
        return self.flops.total / (self.machine.mfu * self.machine.peak_tflops * 1e12)

    @property
    def hidden_seconds(self) -> float:
        """Communication that runs beside the computation."""
        return sum(flow.seconds for flow in self.flows if flow.hidden)

    @property
    def exposed_seconds(self) -> float:
        """Communication that the computation waits for."""
        return sum(flow.seconds for flow in self.flows if not flow.hidden)

    @property
    def step_seconds(self) -> float:
        """The longer of computation and what runs beside it, and then what it waits for."""
        return max(self.compute_seconds, self.hidden_seconds) + self.exposed_seconds


def make_plan(recipe: Recipe, machine: Machine, step: int = 0) -> Plan:
    """Plan optimizer step `step` of a recipe on a machine.

    Raises:
        UserError: the recipe does not divide over the machine's ranks, or a network is neither there nor described.
    """
    layout, knobs = recipe.layout(machine.world_size), knobs_of(recipe)
    objective = build_objective(recipe)
    plans = plan_networks(recipe, objective.roles, build_architecture)
    models = {role: plan.model for plan in plans for role in plan.roles}
    networks = networks_of(plans, layout)
    roles = all_role_bytes(objective.roles, networks, knobs)
    latent_shape = latent_shape_of(recipe, models["generator"])
    phases = objective.phases(step)
    with_adapter = {role for role, network in networks.items() if network.is_adapter}
    planned = _with_costs(phases, models, with_adapter, recipe, latent_shape, fused_norms=machine.fused_norms)
    partition = Partition(models["generator"].num_tokens(latent_shape), layout.ring, layout.ulysses)
    batch = recipe.data.micro_batch_size
    exchanges = {
        role: exchange_of(model, partition, batch=batch, item_bytes=knobs.compute_bytes)
        for role, model in models.items()
    }
    sample_bytes = FLOAT32 * batch * prod(latent_shape)
    kept = _kept_bytes(planned, models["generator"], recipe, layout, sample_bytes)
    distinct = tuple(dict.fromkeys(planned))
    memory = [
        phase_memory(phase, roles, networks, knobs, sample_bytes=sample_bytes, kept_bytes=kept) for phase in distinct
    ]
    return Plan(
        recipe=recipe.run.name,
        step=step,
        machine=machine,
        layout=layout,
        latent_shape=latent_shape,
        tokens=partition.length,
        passes=sample_passes(planned, recomputes=knobs.checkpointing != "none"),
        roles=tuple(roles.values()),
        planned=distinct,
        phases=tuple(memory),
        flops=step_flops(planned, checkpointing=knobs.checkpointing, accumulation=layout.accumulation),
        flows=tuple(step_flows(planned, networks, exchanges, layout, machine, knobs)),
        storage=storage_of(recipe, machine, roles, networks, knobs),
    )


def _with_costs(
    phases: Sequence[Phase],
    models: Mapping[str, VideoModel],
    with_adapter: Collection[str],
    recipe: Recipe,
    latent_shape: LatentShape,
    *,
    fused_norms: bool,
) -> list[PlannedPhase]:
    parallel = recipe.parallel

    def shape(batch: int) -> PassShape:
        samples = batch * recipe.data.micro_batch_size
        text_tokens = recipe.model.text_tokens
        return PassShape(samples, latent_shape, text_tokens, parallel.ring, parallel.ulysses, fused_norms)

    return [
        PlannedPhase(
            phase.role,
            tuple(
                PlannedPasses(p, _costs(recipe, p.role, models[p.role], shape(p.batch)), p.role in with_adapter)
                for p in phase.passes
            ),
            reuses_samples=phase.data == "same",
        )
        for phase in phases
    ]


def _costs(recipe: Recipe, role: str, model: VideoModel, shape: PassShape) -> PassCosts:
    """Costs of one pass, with what the role's head keeps for a backward pass; its FLOPs are too few to count."""
    costs, head = model.pass_costs(shape), recipe.objective.head_of(role)
    if head is None:
        return costs
    for_input, for_weights = heads.saved_bytes(head, model, shape)
    rest = costs.activations.rest_saved
    activations = replace(costs.activations, rest_saved=(rest[0] + for_input, rest[1] + for_weights))
    return replace(costs, activations=activations)


def _kept_bytes(
    planned: Sequence[PlannedPhase], model: VideoModel, recipe: Recipe, layout: Layout, sample_bytes: int
) -> int:
    """Samples and texts of all micro-batches of a rank, where a later phase takes those of the first."""
    if not any(phase.reuses_samples for phase in planned):
        return 0
    text = 2 * recipe.data.micro_batch_size * recipe.model.text_tokens * model.text_dim()
    return layout.accumulation * (sample_bytes + text)
