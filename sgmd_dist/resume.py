"""Where a run begins: anew, at its newest checkpoint, or at the one that `run.resume` names.

run.dir/earlier-1/    what a run that starts anew, or goes back to an earlier step, finds in its way
run.dir/resumed_from  the run's own checkpoint that it went back to
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger

from sgmd_dist import checkpoint
from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import load_recipe

BRANCH_FILE = "resumed_from"
HISTORY = ("metrics.jsonl", "tensorboard")
FREE_SECTIONS = ("run", "checkpoint", "logging")  # may change between two parts of a run without a word


@dataclass(frozen=True)
class Beginning:
    """What `decide` found: the checkpoint to load, or None, and what must leave `run.dir` first."""

    checkpoint: Path | None
    in_the_way: tuple[Path, ...] = ()


def decide(recipe: Recipe) -> Beginning:
    """Look, and change nothing.

    A run that was stopped and is started again by the same command continues with what it saved itself, also where
    `run.resume` names the checkpoint that it began with.

    Raises:
        UserError: `run.resume` names no checkpoint, or a damaged one.
    """
    run_dir, choice = Path(recipe.run.dir), recipe.run.resume
    own = checkpoint.committed(run_dir)
    if choice == "never":
        present = [run_dir / name for name in (checkpoint.FOLDER, *HISTORY) if (run_dir / name).exists()]
        return Beginning(None, tuple(present) if own else ())
    if choice == "auto" or (own and _continues_branch(run_dir, Path(choice))):
        return Beginning(own[-1] if own else None)
    chosen = checkpoint.find(choice)
    checkpoint.read_meta(chosen)
    if run_dir.resolve() not in chosen.resolve().parents:
        return Beginning(own[-1] if own else chosen)
    return Beginning(chosen, tuple(path for path in own if path.name > chosen.name))


def begin(recipe: Recipe, *, is_main: bool) -> Path | None:
    """Decide on the main rank for all, clear the way, and return the checkpoint to load. Collective.

    Raises:
        UserError: see `decide`; on every rank.
    """
    found: list[Any] = [_begin(recipe) if is_main else None]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def _begin(recipe: Recipe) -> Path | UserError | None:
    try:
        beginning = decide(recipe)
        if beginning.checkpoint is not None:
            _report_changes(recipe, beginning.checkpoint)
    except UserError as error:
        return error
    run_dir = Path(recipe.run.dir)
    if beginning.in_the_way:
        moved = _set_aside(run_dir, beginning.in_the_way)
        logger.warning("run.resume = {}: what is in its way in {} is now in {}", recipe.run.resume, run_dir, moved)
    if beginning.checkpoint is not None and beginning.in_the_way:
        write_durably(run_dir / BRANCH_FILE, beginning.checkpoint.name.encode())
    return beginning.checkpoint


def _continues_branch(run_dir: Path, choice: Path) -> bool:
    """True where the run went back to its own checkpoint `choice` before, which may be pruned by now."""
    marker = run_dir / BRANCH_FILE
    if not marker.exists() or choice.resolve().parent != (run_dir / checkpoint.FOLDER).resolve():
        return False
    return marker.read_text(encoding="utf-8") == choice.name


def _set_aside(run_dir: Path, paths: tuple[Path, ...]) -> Path:
    """Move paths of a run folder, at their places, into a new folder in it; metrics are copied with checkpoints."""
    number = 1
    while (target := run_dir / f"earlier-{number}").exists():
        number += 1
    (target / checkpoint.FOLDER).mkdir(parents=True)
    metrics = run_dir / HISTORY[0]
    if metrics.exists() and metrics not in paths:
        shutil.copy2(metrics, target / metrics.name)
    for path in paths:
        place = target / path.relative_to(run_dir)
        if place.is_dir():
            place.rmdir()
        path.rename(place)
    return target


def _report_changes(recipe: Recipe, found: Path) -> None:
    """Warn of every key that differs from the recipe that the checkpoint was saved with."""
    before, now = (_flat(r.resolved()) for r in (load_recipe(found / checkpoint.RECIPE_FILE), recipe))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key.split(".")[0] not in FREE_SECTIONS:
            logger.warning("{}: {} was {}, is {}", found, key, before.get(key), now.get(key))


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
