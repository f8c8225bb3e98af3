"""What makes a run fit that does not: knobs in the order in which one would try them, each planned anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sgmd_dist.assemble import build_objective
from sgmd_dist.errors import UserError
from sgmd_dist.planner.machine import Machine
from sgmd_dist.planner.plan import Plan, make_plan
from sgmd_dist.recipe import Recipe

_MAX_NODES = 1024
_MAX_RING = 16
_LORA_RANK = 64
_OFFLOADED = "parallel.teacher_offload=true"
_NOTABLE = 0.01  # share of the peak that a change must save to be named


@dataclass(frozen=True)
class Change:
    """A change of the recipe, or of the machine, and what the plan says of it.

    Attributes:
        settings: `key=value` words, as a recipe or a command line takes them; `--nodes N` for the machine.
        price: what it costs, in words.
        plan: the plan with the change.
    """

    settings: tuple[str, ...]
    price: str
    plan: Plan


@dataclass(frozen=True)
class Advice:
    """`changes`: each by itself. `remedy`: the first of them that fits, or as many as it takes; None where none do."""

    changes: tuple[Change, ...]
    remedy: Change | None


@dataclass(frozen=True)
class _Knob:
    """Settings to try, from the mildest on, for a recipe on a machine."""

    settings: Callable[[Recipe, Machine], Iterator[tuple[str, ...]]]
    price: str


def advise(recipe: Recipe, machine: Machine, step: int = 0) -> Advice:
    """Changes that lower the peak, and the first that makes the plan fit."""
    start = make_plan(recipe, machine, step)
    singles, remedy = [], None
    settings: tuple[str, ...] = ()
    prices: list[str] = []
    together = start
    for knob in _KNOBS:
        single = _try(knob, recipe, machine, start, (), step)
        if single is None:
            continue
        singles.append(single)
        if single.plan.fits:
            if remedy is None or not single.settings[0].startswith("--"):  # one knob before several, these before nodes
                remedy = single
            break
        more = _try(knob, recipe, machine, together, settings, step)
        if more is None and _OFFLOADED in settings:  # adapters keep the teacher on the GPU
            more = _try(knob, recipe, machine, together, tuple(s for s in settings if s != _OFFLOADED), step)
        if more is not None and remedy is None:
            settings, together = more.settings, more.plan
            prices.append(knob.price)
            if together.fits:
                remedy = Change(settings, "; ".join(prices), together)
    return Advice(tuple(singles), remedy)


def _try(
    knob: _Knob, recipe: Recipe, machine: Machine, before: Plan, settings: tuple[str, ...], step: int
) -> Change | None:
    """The knob's first setting that fits on top of `settings`, or its last one that saves anything."""
    found: Change | None = None
    for more in knob.settings(recipe, machine):
        combined = (*settings, *more)
        try:
            plan = make_plan(*apply(combined, recipe, machine), step)
        except UserError:  # this setting does not divide; the next one may
            continue
        if plan.peak_bytes > (1 - _NOTABLE) * (found.plan if found else before).peak_bytes:
            continue
        found = Change(combined, knob.price, plan)
        if plan.fits:
            break
    return found


def apply(settings: tuple[str, ...], recipe: Recipe, machine: Machine) -> tuple[Recipe, Machine]:
    """The recipe and the machine with `key=value` settings.

    Raises:
        UserError: a value is not allowed.
    """
    data = recipe.resolved()
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "--nodes":
            machine = replace(machine, nodes=int(value))
            continue
        *path, last = key.split(".")
        section = data
        for part in path:
            if section[part] is None:
                section[part] = {}
            section = section[part]
        section[last] = int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value)
    try:
        return type(recipe).model_validate(data), machine
    except ValueError as error:
        raise UserError(f"{' '.join(settings)}: {error}") from None


def _checkpointing(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, ...]]:
    if recipe.parallel.activation_checkpointing != "block":
        yield ("parallel.activation_checkpointing=block",)


def _micro_batch(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, ...]]:
    size = recipe.data.micro_batch_size
    for smaller in range(size - 1, 0, -1):
        if size % smaller == 0:
            yield (f"data.micro_batch_size={smaller}",)


def _guidance(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, ...]]:
    if recipe.resolved()["objective"].get("guidance") == "batched":
        yield ("objective.guidance=separate",)


def _offload(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, ...]]:
    if recipe.resolved()["parallel"].get("teacher_offload") is False:
        yield (_OFFLOADED,)


def _ulysses(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, ...]]:
    size = 2 * recipe.parallel.ulysses
    while size <= machine.gpus_per_node:
        yield (f"parallel.ulysses={size}",)
        size *= 2


def _ring(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, ...]]:
    size = 2 * recipe.parallel.ring
    while size <= _MAX_RING and size * recipe.parallel.ulysses <= machine.world_size:
        yield (f"parallel.ring={size}",)
        size *= 2


def _replicas(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, ...]]:
    if recipe.parallel.dp_replicate > 1:
        yield ("parallel.dp_replicate=1",)


def _adapters(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, ...]]:
    roles = [role for role, trained in build_objective(recipe).roles.items() if trained]
    if not any(recipe.model.lora_of(role) for role in roles):
        yield tuple(f"model.{role}.lora.rank={_LORA_RANK}" for role in roles)


def _nodes(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, ...]]:
    nodes = 2 * machine.nodes
    while nodes <= _MAX_NODES:
        yield (f"--nodes={nodes}",)
        nodes *= 2


_KNOBS = (
    _Knob(_checkpointing, "each block runs forward once more"),
    _Knob(_micro_batch, "smaller kernels, more all-gathers"),
    _Knob(_guidance, "the teacher's two conditions one after the other, in smaller kernels"),
    _Knob(_replicas, "all-gathers over all nodes"),
    _Knob(_offload, "the teacher's shards come from the host for each pass"),
    _Knob(_ulysses, "all-to-alls in every block, fewer videos at once"),
    _Knob(_ring, "keys travel from rank to rank in every block, fewer videos at once"),
    _Knob(_adapters, "adapters on one shared base in the place of whole networks: what they can learn is less"),
    _Knob(_nodes, "more GPUs"),
)
