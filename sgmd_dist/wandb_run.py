"""A run on Weights & Biases, continued under one id. The package is an extra, imported only where it is asked for.

run.dir/wandb_run_id   the id, made at the run's first start
run.dir/wandb/         the package's own files
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError, describe
from sgmd_dist.recipe import Recipe

ID_FILE = "wandb_run_id"
_ID_BYTES = 4  # as the ids that W&B itself makes


def check(recipe: Recipe) -> None:
    """Refuse to report to W&B without its package.

    Raises:
        UserError: `logging.wandb` is set and the package is not installed.
    """
    if recipe.logging.wandb is None:
        return
    found = importlib.util.find_spec("wandb")
    if (
        found is None or found.origin is None
    ):  # without one, a folder that only has this name, as the package makes them
        raise UserError(
            "logging.wandb: the package wandb is not installed; pip install 'sgmd_dist[wandb]' (in a clone: pip install"
            " -e '.[wandb]'), or set logging.wandb to null"
        )


class WandbRun:
    """The run of a folder on W&B, from construction to `close`. For the main rank."""

    def __init__(self, recipe: Recipe) -> None:
        """
        Raises:
            UserError: W&B refuses the run, as without a login or in a wrong environment.
        """
        section = recipe.logging.wandb
        assert section is not None
        import wandb  # pyright: ignore[reportMissingImports]

        run_dir = Path(recipe.run.dir)
        try:
            self._run: Any = wandb.init(
                **section.model_dump(),
                name=recipe.run.name,
                id=_kept_id(run_dir / ID_FILE),
                resume="allow",
                dir=str(run_dir),
                config=recipe.resolved(),
                settings=wandb.Settings(console="off", quiet=True),
            )
        except (wandb.Error, ValueError) as error:  # the latter of its settings, which its variables may spoil
            raise UserError(
                f"logging.wandb: {describe(error)}; run `wandb login` on the node of rank 0 or set WANDB_API_KEY, set"
                " logging.wandb.mode to offline, or logging.wandb to null"
            ) from None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Report the scalars of optimizer step number `step`; W&B itself drops steps that it has already."""
        if self._run is not None:
            self._go_on_without(lambda run: run.log(dict(scalars), step=step))

    def close(self, *, failed: bool = False) -> None:
        """End the run on W&B, as one that failed or not."""
        if self._run is not None:
            self._go_on_without(lambda run: run.finish(exit_code=int(failed)))

    def _go_on_without(self, report: Callable[[Any], None]) -> None:
        """Report, or warn and report no more: the numbers are in metrics.jsonl too, and all ranks wait for this one."""
        try:
            report(self._run)
        except Exception as error:  # whatever the package raises where its service or its disk is gone
            logger.warning("logging.wandb: {}; training goes on without W&B", describe(error))
            self._run = None


def _kept_id(path: Path) -> str:
    """The id under which the run folder's run began, or a new one."""
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(_ID_BYTES)
    write_durably(path, f"{made}\n".encode())
    return made
