"""Where a run begins: anew, at its newest checkpoint, or at the one that `run.resume` names.

run.dir/earlier-1/    what a run that starts anew, or goes back to an earlier step, finds in its way
run.dir/resumed_from  the run's own checkpoint that it went back to
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from sgmd_dist import checkpoint
from sgmd_dist.checkpoint import Loaded, together
from sgmd_dist.durable import write_durably
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.roles import Roles
from sgmd_dist.wandb_run import ID_FILE

BRANCH_FILE = "resumed_from"
HISTORY = ("metrics.jsonl", "tensorboard", "samples", checkpoint.ROLLBACKS_FILE, ID_FILE)
# May change between two parts of a run without a word.
FREE_SECTIONS = ("run", "checkpoint", "samples", "logging", "health")


@dataclass(frozen=True)
class Beginning:
    """What `decide` found: the checkpoints to try, best first and none to start anew, and what must leave `run.dir`."""

    candidates: tuple[Path, ...]
    in_the_way: tuple[Path, ...] = ()


def decide(recipe: Recipe) -> Beginning:
    """Look, and change nothing.

    A run that was stopped and is started again by the same command continues with what it saved itself, also where
    `run.resume` names the checkpoint that it began with. A checkpoint that `run.resume` names has no stand-in.

    Raises:
        UserError: `run.resume` names no checkpoint, or a damaged one.
    """
    run_dir, choice = Path(recipe.run.dir), recipe.run.resume
    own = checkpoint.present(run_dir)
    if choice == "never":
        present = [run_dir / name for name in (checkpoint.FOLDER, *HISTORY) if (run_dir / name).exists()]
        return Beginning((), tuple(present) if own else ())
    if choice == "auto" or (own and _continues_branch(run_dir, Path(choice))):
        return Beginning(tuple(reversed(own)))
    chosen = _chosen(Path(choice))
    if run_dir.resolve() not in chosen[0].resolve().parents:
        return Beginning((*reversed(own), *chosen))
    later = tuple(path for path in own if path.name > chosen[0].name)
    known_steps = (run_dir / ID_FILE,) if later and (run_dir / ID_FILE).exists() else ()
    return Beginning(chosen, (*later, *known_steps))


def _chosen(choice: Path) -> tuple[Path, ...]:
    """The checkpoint that `choice` names, or those of the run folder that it names, newest first."""
    newest = checkpoint.find(choice)
    if newest == choice:
        checkpoint.read_meta(choice)
        return (choice,)
    return tuple(reversed(checkpoint.present(choice)))


def begin(recipe: Recipe, roles: Roles, *, is_main: bool) -> Loaded | None:
    """Decide for all ranks on the main one, load, then clear the way; None where the run starts anew. Collective.

    Raises:
        UserError: see `decide` and `checkpoint.load_newest`; on every rank.
    """
    beginning = together(lambda: decide(recipe) if is_main else None)[0]
    assert beginning is not None
    loaded = checkpoint.load_newest(beginning.candidates, roles) if beginning.candidates else None
    together(lambda: _settle(recipe, beginning, loaded) if is_main else None)
    return loaded


def _settle(recipe: Recipe, beginning: Beginning, loaded: Loaded | None) -> None:
    """Report what differs, and move away what is damaged or in the way of the run that begins."""
    run_dir = Path(recipe.run.dir)
    if loaded is not None:
        _report_changes(recipe, loaded.path)
        for path, why in loaded.damaged.items():
            own = path.parent.parent.resolve() == run_dir.resolve()
            place = checkpoint.set_damaged_aside(path) if own else path
            logger.warning("{} (it is now {}); {} is used instead", why, place, loaded.path)
    if beginning.in_the_way:
        moved = _set_aside(run_dir, beginning.in_the_way)
        logger.warning("run.resume = {}: what is in its way in {} is now in {}", recipe.run.resume, run_dir, moved)
        if loaded is not None:
            write_durably(run_dir / BRANCH_FILE, loaded.path.name.encode())


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
