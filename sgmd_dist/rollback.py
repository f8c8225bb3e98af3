"""Going back to the last checkpoint where updates fail one after the other.

run.dir/rollbacks.json  a list: after which step a run gave up, and which step it went back to

How often a run went back decides its noise from then on, so that it does not meet the same draws again; a run that is
killed and resumed draws what it would have drawn.
"""

from __future__ import annotations

import json
from pathlib import Path

from loguru import logger

from sgmd_dist import checkpoint, rng
from sgmd_dist.checkpoint import Loaded, together
from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.roles import Roles
from sgmd_dist.watch_sections import HealthSection

_MEND = (
    "the gradients are not finite, or their norm is not: lower optim.generator.lr or optim.fake_score.lr, look for"
    " latents that are out of range, or raise the limit, and start the same command again"
)


class Rollbacks:
    """How often the run of a folder went back, and the noise that follows from it. Collective; equal on all ranks."""

    def __init__(self, run_dir: Path, section: HealthSection, seed: int, *, is_main: bool) -> None:
        self._run_dir, self._section, self._seed, self._is_main = run_dir, section, seed, is_main
        self._done = together(lambda: _read(run_dir / checkpoint.ROLLBACKS_FILE) if is_main else [])[0]

    @property
    def noise_seed(self) -> int:
        """The seed of the objective's draws: the run's own until it first goes back."""
        return rng.key(self._seed, "rollback", len(self._done)) >> 1 if self._done else self._seed

    def go_back(self, roles: Roles, step: int) -> Loaded:
        """Load the newest checkpoint, and note it.

        Args:
            step: optimizer steps taken so far.

        Raises:
            UserError: there is no checkpoint, or the run went back `health.rollbacks` times already; on every rank.
        """
        limit = (
            f"health.max_skipped = {self._section.max_skipped}: so many updates in a row were skipped by step {step}"
        )
        if len(self._done) >= self._section.rollbacks:
            raise UserError(f"{limit}, after {len(self._done)} rollbacks of health.rollbacks; {_MEND}")
        newest = together(lambda: [*reversed(checkpoint.committed(self._run_dir))] if self._is_main else [])[0]
        if not newest:
            raise UserError(f"{limit}, and {self._run_dir} has no checkpoint to go back to; {_MEND}")
        roles.train_only(None)
        loaded = checkpoint.load_newest(newest, roles)
        self._done = [*self._done, {"from": step, "to": loaded.meta.step}]
        if self._is_main:
            write_durably(self._run_dir / checkpoint.ROLLBACKS_FILE, (json.dumps(self._done) + "\n").encode())
        logger.warning("{}; back to {} with new noise", limit, loaded.path)
        return loaded


def _read(path: Path) -> list[dict[str, int]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
