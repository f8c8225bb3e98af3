"""A run's metrics.jsonl as curves, grouped into charts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Points = list[tuple[float, float]]  # (optimizer step, value)

CHARTS: dict[str, tuple[str, ...]] = {
    "Tracking residual of the fake score": ("fake_score/residual",),
    "Gap between teacher and fake score": ("generator/teacher_fake_gap", "generator/teacher_distance"),
    "Latent motion of the samples": ("generator/latent_motion",),
    "Motion over the teacher's": ("health/motion_ratio",),
    "Colours off the teacher's": ("health/colour_drift",),
    "Gradient norms": ("generator/grad_norm", "fake_score/grad_norm"),
    "Losses of the generator": tuple(
        f"generator/{name}"
        for name in ("loss", "fisher", "nr", "dmd", "score_identity", "regression", "gan", "diversity")
    ),
    "Losses of the fake score": ("fake_score/loss", "fake_score/gan"),
    "Mean alpha": ("generator/alpha",),
    "Seconds": ("time/step_s", "time/generator_s", "time/fake_score_s", "data/wait_s"),
    "Updates skipped": ("generator/skipped", "fake_score/skipped"),
}


@dataclass(frozen=True)
class Chart:
    """Curves over the optimizer step that share axes, by their metrics' names."""

    title: str
    curves: Mapping[str, Points]


def read_curves(path: Path) -> list[Chart]:
    """The charts for which the file has numbers; none where there is no file. A line that is no JSON is passed over, as
    the last one of a killed run may be; a value that is not finite is a gap of its curve (NaN)."""
    if not path.is_file():
        return []
    curves: dict[str, Points] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            step = float(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, value in values.items():
            if isinstance(value, int | float):
                curves.setdefault(name, []).append((step, float(value) if math.isfinite(value) else math.nan))
    charts = (Chart(title, _existing(curves, names)) for title, names in CHARTS.items())
    return [chart for chart in charts if chart.curves]


def _existing(curves: Mapping[str, Points], names: Sequence[str]) -> dict[str, Points]:
    """Those of the curves that hold a number, and not only zeros."""
    return {name: curves[name] for name in names if any(y != 0 and not math.isnan(y) for _, y in curves.get(name, []))}
