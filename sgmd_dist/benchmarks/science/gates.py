"""Bounds that a run of the comparison must keep, set from several seeds (docs/science.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from sgmd_dist.benchmarks.science.methods import DMD2, SGMD_FAST_FAKE
from sgmd_dist.benchmarks.science.study import Budget, Study
from sgmd_dist.benchmarks.science.training import Curve


@dataclass(frozen=True)
class Gate:
    """A value and the largest that passes."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Verdict:
    """The gates of a run."""

    gates: Sequence[Gate]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    def table(self) -> str:
        """A line for each gate."""
        return "\n".join(
            f"{'ok' if gate.passed else 'FAILED':<7}{gate.name}: {gate.value:.3f}, at most {gate.limit:g}"
            for gate in self.gates
        )


def smoke(workers: int, folder: Path | None = None) -> Verdict:
    """SGMD against DMD2 5:1 in the world of trajectories, 1500 passes, four seeds, at the last exit.

    Args:
        workers, folder: see `study.run_jobs`.
    """
    study = Study("trajectories", (SGMD_FAST_FAKE, DMD2), (1e-3,), 4, 0, Budget(1500, 4, 512, 2048))
    curves = study.run(workers, folder)
    return judge_smoke(curves[SGMD_FAST_FAKE], curves[DMD2])


def judge_smoke(sgmd: Sequence[Curve], dmd2: Sequence[Curve]) -> Verdict:
    """The gates of `smoke` on curves of both methods."""
    ours, theirs = ([curve.best().scores["swd"] for curve in curves] for curves in (sgmd, dmd2))
    speeds = [curve.best().scores["speed_ratio"] for curve in sgmd]
    return Verdict(
        (
            Gate("best swd, mean of SGMD over mean of DMD2 5:1", fmean(ours) / fmean(theirs), 0.75),
            Gate("best swd, worst seed of SGMD over best seed of DMD2 5:1", max(ours) / min(theirs), 0.9),
            Gate("speed, mean of SGMD, distance from the teacher's", abs(fmean(speeds) - 1), 0.15),
        )
    )
