"""Line charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from sgmd_dist.report.curves import Chart, Points

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 36  # margins of the plot in the picture
COLOURS = ("#2563a8", "#d2691e", "#2e8b57", "#8a4fb0", "#5f6b7a")
LOG_RANGE = 50.0  # of positive values, from where on their axis is logarithmic


def line_chart(chart: Chart) -> str:
    """The chart as an `<svg>` element, with its legend as HTML above. The value axis is logarithmic where values are
    positive and reach over more than `LOG_RANGE`."""
    values = [y for points in chart.curves.values() for _, y in points if not math.isnan(y)]
    steps = [x for points in chart.curves.values() for x, _ in points]
    is_log = min(values) > 0 and max(values) / min(values) > LOG_RANGE
    y_ticks = log_ticks(min(values), max(values)) if is_log else ticks(min(values), max(values))
    x_ticks = [x for x in ticks(min(steps), max(steps)) if min(steps) <= x <= max(steps)]
    x_scale = _Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y_scale = _Scale(min(*y_ticks, *values), max(*y_ticks, *values), HEIGHT - BOTTOM, TOP, is_log)
    parts = [_grid(x_scale, y_scale, x_ticks, y_ticks)]
    for colour, (name, points) in zip(COLOURS * 3, chart.curves.items(), strict=False):
        parts.append(_curve(name, points, colour, x_scale, y_scale))
    label = f"{chart.title} over the optimizer step"
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}{_legend(chart.curves)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg></figure>'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) that span `low` to `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The powers of ten that span `low` to `high`, at most 7 of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    return [10.0**power for power in range(first, last + stride, stride)]


class _Scale:
    """From values to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, is_log: bool = False) -> None:
        self._of = math.log10 if is_log else float
        self._low, span = self._of(low), self._of(high) - self._of(low)
        self._start, self._factor = start, (end - start) / span if span else 0.0
        if not span:
            self._start = (start + end) / 2

    def __call__(self, value: float) -> float:
        return round(self._start + (self._of(value) - self._low) * self._factor, 1)


def _grid(x_scale: _Scale, y_scale: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
    parts = []
    for y in y_ticks:
        at = y_scale(y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{x_scale(x)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">optimizer step</text>')
    return "".join(parts)


def _curve(name: str, points: Points, colour: str, x_scale: _Scale, y_scale: _Scale) -> str:
    """A line through the points, in pieces where a value is missing; a dot where a piece is one point."""
    pieces: list[Points] = [[]]
    for x, y in points:
        if math.isnan(y):
            pieces.append([])
        else:
            pieces[-1].append((x_scale(x), y_scale(y)))
    drawn = []
    for piece in filter(None, pieces):
        if len(piece) == 1:
            drawn.append(f'<circle cx="{piece[0][0]}" cy="{piece[0][1]}" r="3" fill="{colour}"/>')
        else:
            path = " ".join(f"{x},{y}" for x, y in piece)
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    return f"<g><title>{escape(name)}</title>{''.join(drawn)}</g>"


def _legend(curves: Mapping[str, Points]) -> str:
    """Name and last value of each curve."""
    items = []
    for colour, (name, points) in zip(COLOURS * 3, curves.items(), strict=False):
        last = next(y for _, y in reversed(points) if not math.isnan(y))
        items.append(f'<span><i style="background:{colour}"></i>{escape(name)} <b>{last:.4g}</b></span>')
    return f'<span class="legend">{"".join(items)}</span>'


def number(value: float) -> str:
    """A tick's value, short."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"
