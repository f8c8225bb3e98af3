"""How a recipe lies on ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgmd_dist.errors import UserError

if TYPE_CHECKING:
    from sgmd_dist.recipe import Recipe


@dataclass(frozen=True)
class Layout:
    """How a recipe lies on `world_size` ranks. `num_units` micro-batches make one optimizer step."""

    world_size: int
    dp_replicate: int
    dp_shard: int
    ring: int
    ulysses: int
    num_units: int
    accumulation: int

    @property
    def dp_size(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def sequence_size(self) -> int:
        return self.ring * self.ulysses


def place(recipe: Recipe, world_size: int) -> Layout:
    """`Recipe.layout`."""
    dp_shard = _dp_shard(recipe, world_size)
    _check_reshard(recipe, dp_shard * recipe.parallel.ring * recipe.parallel.ulysses)
    dp_size = recipe.parallel.dp_replicate * dp_shard
    num_units = _units_per_step(recipe, dp_size)
    return Layout(
        world_size=world_size,
        dp_replicate=recipe.parallel.dp_replicate,
        dp_shard=dp_shard,
        ring=recipe.parallel.ring,
        ulysses=recipe.parallel.ulysses,
        num_units=num_units,
        accumulation=num_units // dp_size,
    )


def _dp_shard(recipe: Recipe, world_size: int) -> int:
    axes = recipe.parallel
    others = axes.dp_replicate * axes.ring * axes.ulysses
    product = f"dp_replicate {axes.dp_replicate} x ring {axes.ring} x ulysses {axes.ulysses}"
    if axes.dp_shard == -1:
        if world_size < 1 or world_size % others:
            name = next((n for n in ("ulysses", "ring") if getattr(axes, n) > 1), "dp_replicate")
            raise UserError(
                f"parallel.{name} = {getattr(axes, name)}: {world_size} ranks are not a multiple of {product}"
                f" = {others}; start a multiple of {others} ranks or change these axes"
            )
        return world_size // others
    if axes.dp_shard * others != world_size:
        raise UserError(
            f"parallel.dp_shard = {axes.dp_shard}: {product} x dp_shard {axes.dp_shard} makes"
            f" {axes.dp_shard * others} ranks, not {world_size}; set it to -1 (the rest) or start"
            f" {axes.dp_shard * others} ranks"
        )
    return axes.dp_shard


def _check_reshard(recipe: Recipe, shard_size: int) -> None:
    ranks = recipe.parallel.reshard_after_forward
    if not isinstance(ranks, bool) and (shard_size % ranks or ranks == shard_size):
        raise UserError(
            f"parallel.reshard_after_forward = {ranks}: parameters lie over dp_shard x ring x ulysses ="
            f" {shard_size} ranks; expected a smaller divisor of that, as the number of GPUs of a node, true or"
            " false"
        )


def _units_per_step(recipe: Recipe, dp_size: int) -> int:
    batch, micro = recipe.data.global_batch_size, recipe.data.micro_batch_size
    if batch % (micro * dp_size):
        raise UserError(
            f"data.global_batch_size = {batch} is not a multiple of data.micro_batch_size {micro} x data-parallel"
            f" size {dp_size} = {micro * dp_size}; {_nearest_multiple(batch, micro * dp_size)}"
        )
    num_units, groups = batch // micro, recipe.objective.exit_groups
    if num_units % groups or (num_units // groups) % dp_size:
        raise UserError(
            f"objective.exit_groups = {groups}: the {num_units} micro-batches of a step must split into {groups}"
            f" equal groups, each a multiple of the data-parallel size {dp_size}; choose a divisor of"
            f" {num_units // dp_size}"
        )
    return num_units


def _nearest_multiple(value: int, factor: int) -> str:
    lower = value // factor * factor
    return f"set it to {lower + factor}" if lower == 0 else f"set it to {lower} or {lower + factor}"
