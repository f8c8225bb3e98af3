"""Tables and curves of a study."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from sgmd_dist.benchmarks.report import machine
from sgmd_dist.benchmarks.science.methods import DMD2
from sgmd_dist.benchmarks.science.training import Curve, Point
from sgmd_dist.durable import write_durably

_BESIDES = ("motion_ratio", "speed_ratio", "fast_ratio", "jitter_ratio", "mode_coverage", "precision", "shape_error")


@dataclass
class Report:
    """Curves by world and method, one for each seed."""

    command: str
    curves: dict[str, dict[str, list[Curve]]] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=lambda: machine())

    def tables(self) -> str:
        """For each world the methods at equal passes, the best at equal CPU time, and what each exit has become."""
        return "\n\n".join(
            f"{world_table(world, methods)}\n\n{exits_table(methods)}" for world, methods in self.curves.items()
        )

    def write(self, folder: Path) -> None:
        """Write results.json, tables.md and, for each world, curves as a PNG."""
        content = {
            "command": self.command,
            "machine": self.machine,
            "curves": {
                world: {name: [asdict(curve) for curve in curves] for name, curves in methods.items()}
                for world, methods in self.curves.items()
            },
        }
        write_durably(folder / "results.json", (json.dumps(content) + "\n").encode())
        write_durably(folder / "tables.md", (self.tables() + "\n").encode())
        for world, methods in self.curves.items():
            plot(world, methods, folder / f"{world}.png")


def world_table(world: str, methods: Mapping[str, Sequence[Curve]]) -> str:
    """A Markdown table: mean and standard deviation over the seeds.

    `best swd in T CPU s`: T is what the cheapest method's whole training takes. `passes to` and `CPU s to` count until
    the first score that reaches the mean of DMD2 5:1's last and of its best ones, over the seeds that reach it.
    """
    first = next(iter(methods.values()))[0]
    besides = [name for name in _BESIDES if name in first.points[0].scores]
    cpu_s = min(fmean(curve.points[-1].cpu_s for curve in curves) for curves in methods.values())
    targets = targets_of(methods[DMD2]) if DMD2 in methods else []
    head = ["method", "lr", "passes per step", "CPU ms per step", "best swd", "its passes", "last swd"]
    head += [
        f"best swd in {cpu_s:.0f} CPU s",
        *(f"{cost} to {score:.3f}" for score in targets for cost in ("passes", "CPU s")),
    ]
    rows = [_row(name, curves, cpu_s, targets, besides) for name, curves in methods.items()]
    lines = [[*head, *(f"{name} there" for name in besides)], ["---"] * (len(head) + len(besides)), *rows]
    start = first.points[0].scores
    intro = (
        f"{world}: {len(next(iter(methods.values())))} seeds; before distillation swd {start['swd']:.3f}, "
        + ", ".join(f"{name} {start[name]:.2f}" for name in besides)
    )
    return intro + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(
    name: str, curves: Sequence[Curve], cpu_s: float, targets: Sequence[float], besides: Sequence[str]
) -> list[str]:
    best = [curve.best() for curve in curves]
    steps = [curve.points[-1].steps for curve in curves]
    row = [
        name + _divergences(curves),
        f"{curves[0].lr:g}",
        f"{fmean(c.points[-1].passes / n for c, n in zip(curves, steps, strict=True)):.1f}",
        f"{1000 * fmean(c.points[-1].cpu_s / n for c, n in zip(curves, steps, strict=True)):.1f}",
        spread([point.scores["swd"] for point in best], 3),
        spread([point.passes for point in best], 0),
        spread([curve.points[-1].scores["swd"] for curve in curves], 3),
        spread([curve.best(cpu_s=cpu_s).scores["swd"] for curve in curves], 3),
    ]
    for target in targets:
        reached = [point for curve in curves if (point := curve.first_below(target)) is not None]
        row += [
            _reached(reached, len(curves), lambda p: p.passes, 0),
            _reached(reached, len(curves), lambda p: p.cpu_s, 1),
        ]
    return row + [spread([point.scores[key] for point in best], 2) for key in besides]


def exits_table(methods: Mapping[str, Sequence[Curve]]) -> str:
    """A Markdown table of how trainings go on: swd and motion of the samples that leave the chain at each exit, from
    the first to the last; SGMD's mean alpha over the last quarter; and the swd where the last exit's motion first
    reached the teacher's, where `health.motion` would have stopped. Means over the seeds that did not diverge."""
    finished = {name: [c for c in curves if not c.diverged] for name, curves in methods.items()}
    finished = {name: curves for name, curves in finished.items() if curves}
    if not finished:
        return "every training diverged"
    first = next(iter(finished.values()))[0].exits[0]
    motion = next((name for name in ("motion_ratio", "speed_ratio") if name in first), None)
    head = ["method", "swd by exit", *([f"{motion} by exit", f"swd at {motion} 1"] if motion else []), "alpha"]
    rows = [head, ["---"] * len(head)]
    for name, curves in finished.items():
        moved = [_by_exit(curves, motion), _at_the_teachers_motion(curves, motion)] if motion else []
        alphas = [curve.metrics["generator/alpha"] for curve in curves if "generator/alpha" in curve.metrics]
        rows.append([name, _by_exit(curves, "swd"), *moved, f"{fmean(alphas):.3f}" if alphas else "-"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _at_the_teachers_motion(curves: Sequence[Curve], motion: str) -> str:
    reached = [next((p for p in curve.points if p.scores[motion] >= 1), None) for curve in curves]
    return _reached([p for p in reached if p is not None], len(curves), lambda p: p.scores["swd"], 3)


def _by_exit(curves: Sequence[Curve], name: str) -> str:
    digits = 3 if name == "swd" else 2
    return ", ".join(
        f"{fmean(scores[name] for scores in column):.{digits}f}"
        for column in zip(*(curve.exits for curve in curves), strict=True)
    )


def _divergences(curves: Sequence[Curve]) -> str:
    count = sum(curve.diverged for curve in curves)
    return f" ({count} diverged)" if count else ""


def _reached(points: Sequence[Point], num_seeds: int, value: Callable[[Point], float], digits: int) -> str:
    if not points:
        return "never"
    short = "" if len(points) == num_seeds else f" ({len(points)} of {num_seeds})"
    return spread([value(point) for point in points], digits) + short


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


def targets_of(curves: Sequence[Curve]) -> list[float]:
    """What others are timed to: the mean over the seeds of the last swd, and of the best, to three digits."""
    last = fmean(curve.points[-1].scores["swd"] for curve in curves)
    best = fmean(curve.best().scores["swd"] for curve in curves)
    return list(dict.fromkeys((round(last, 3), round(best, 3))))


def plot(world: str, methods: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Quality against passes: the mean over the seeds, and of few methods their range."""
    from matplotlib import colormaps  # an extra; nothing else needs it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    palette = colormaps["tab20" if len(methods) > 10 else "tab10"]
    axes.set_prop_cycle(color=[palette(i) for i in range(palette.N)])
    for name, curves in methods.items():
        length = min(len(curve.points) for curve in curves)
        columns = [[curve.points[i] for curve in curves] for i in range(length)]
        passes = [fmean(point.passes for point in column) for column in columns]
        values = [[point.scores["swd"] for point in column] for column in columns]
        (line,) = axes.plot(passes, [fmean(column) for column in values], label=name)
        if len(methods) > 5:
            continue
        axes.fill_between(passes, [*map(min, values)], [*map(max, values)], color=line.get_color(), alpha=0.12)
    axes.set(title=world, xlabel="network passes per sample", ylabel="sliced Wasserstein distance to the teacher")
    if all(point.scores["swd"] > 0 for curves in methods.values() for curve in curves for point in curve.points):
        axes.set_yscale("log")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)
