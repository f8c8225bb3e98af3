"""The page: tables, charts and videos put together."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from sgmd_dist.report.chart import line_chart
from sgmd_dist.report.curves import Chart

MEANINGS = {
    "swd": "sliced Wasserstein distance to the teacher's other videos; lower is better, the teacher's row is the floor",
    "motion_ratio": "change from frame to frame over the teacher's; 1 is best",
    "speed_ratio": "displacement over the teacher's; 1 is best; made for one moving thing on an even ground",
    "jitter": "share of a video that is not one rigid picture in constant motion; lower is better",
    "energy": "squared energy distance to the teacher's other videos; lower is better, about 0 for one distribution",
    "consistency": "cosine similarity of neighbouring frames; the teacher's is best, 1 stands still",
    "frame_colour_drift": "change of the mean colour from the first to the last frame; the teacher's is best",
    "swd_real": "swd to real videos",
    "energy_real": "energy to real videos",
    "seconds_per_video": "of one rank on the machine named below, without decoding",
    "passes_per_video": "network passes; a guided step takes two",
}

_PAUSE = "this.paused ? this.play() : this.pause()"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 24px 60px; color: #1c2430; background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 26px; }
h2 { margin: 38px 0 12px; padding-bottom: 5px; font-size: 18px; border-bottom: 1px solid #d9dee5; }
.subtitle, .note { margin: 4px 0 0; color: #5a6575; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid #e6eaef; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { font-weight: 600; color: #435061; }
tbody td.after { background: #eef5fc; font-weight: 600; }
tbody td:first-child { min-width: 250px; white-space: normal; }
td small { display: block; color: #5a6575; font-size: 12.5px; line-height: 1.35; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 14px 0 0; font-size: 13px; }
dt { font-family: ui-monospace, Consolas, monospace; color: #435061; }
dd { margin: 0; color: #5a6575; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 22px 26px; }
figure { margin: 0; min-width: 0; }
figcaption, li { overflow-wrap: anywhere; }
.chart figcaption { margin-bottom: 4px; font-weight: 600; font-size: 14px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-weight: 400; font-size: 12px; color: #5a6575; }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
.legend b { color: #1c2430; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, Arial, sans-serif; fill: #5a6575; }
svg .grid { stroke: #e6eaef; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 22px 26px; }
.clips video { display: block; width: 100%; border-radius: 4px; background: #18181c; }
.clips .columns { display: flex; font-size: 12px; color: #5a6575; }
.clips .columns span { flex: 1; text-align: center; }
.clips figcaption { margin-bottom: 3px; font-weight: 600; font-size: 14px; }
details { margin-top: 12px; } summary { cursor: pointer; color: #435061; }
ol { margin: 8px 0; padding-left: 34px; font-size: 13px; columns: 2 320px; }
"""


@dataclass(frozen=True)
class Clip:
    """A video with the page's columns side by side: an mp4 file's bytes, H.264 in yuv420p, which all browsers play."""

    caption: str
    mp4: bytes


@dataclass(frozen=True)
class Page:
    """All that the page shows.

    Attributes:
        scores: `scores[column][name]`, shown in the order of `names` as far as any column has them.
        columns: titles of what lies side by side in each clip.
        facts: groups of names and values, shown as they are.
    """

    title: str
    subtitle: str
    scores: Mapping[str, Mapping[str, float]]
    names: Sequence[str]
    columns: Sequence[str]
    clips: Sequence[Clip]
    curves: Sequence[Chart]
    facts: Mapping[str, Mapping[str, Any]]
    prompts: Sequence[str] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as one HTML document that loads nothing."""
    sections = [
        _section("Scores", _table(page.scores, page.names)),
        _section("Samples", f'<div class="clips">{"".join(_clip(clip, page.columns) for clip in page.clips)}</div>'),
        _section("Training", _charts(page.curves)),
        *(_section(name, _facts(facts)) for name, facts in page.facts.items()),
        _prompts(page.prompts),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(page.title)}</h1>\n<p class="subtitle">{escape(page.subtitle)}</p>\n'
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def _table(scores: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> str:
    """One row per score, with its meaning."""
    head = "".join(f"<th>{escape(label)}</th>" for label in scores)
    body = []
    for name in names:
        if any(name in column for column in scores.values()):
            cells = "".join(_cell(label, column.get(name)) for label, column in scores.items())
            meaning = f"<small>{escape(MEANINGS.get(name, ''))}</small>"
            body.append(f"<tr><td>{escape(name)}{meaning}</td>{cells}</tr>")
    rows = "\n".join(body)
    top = f"<thead><tr><th></th>{head}</tr></thead>"
    return f'<div class="scroll"><table>{top}\n<tbody>{rows}</tbody></table></div>'


def _cell(label: str, value: float | None) -> str:
    return f'<td class="{escape(label)}">{"" if value is None else f"{value:.3f}"}</td>'


def _clip(clip: Clip, columns: Sequence[str]) -> str:
    titles = "".join(f"<span>{escape(column)}</span>" for column in columns)
    data = base64.b64encode(clip.mp4).decode()
    return (
        f'<figure><figcaption>{escape(clip.caption)}</figcaption><div class="columns">{titles}</div>'
        f'<video src="data:video/mp4;base64,{data}" autoplay loop muted playsinline title="click to pause"'
        f' onclick="{_PAUSE}"></video></figure>'
    )


def _charts(charts: Sequence[Chart]) -> str:
    if not charts:
        return '<p class="note">The run left no metrics.jsonl beside its checkpoints.</p>'
    return f'<div class="charts">{"".join(line_chart(chart) for chart in charts)}</div>'


def _facts(facts: Mapping[str, Any]) -> str:
    items = (f"<dt>{escape(name)}</dt><dd>{escape(_shown(value))}</dd>" for name, value in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return value if isinstance(value, str) and value else json.dumps(value)


def _prompts(prompts: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
    return f"<details><summary>{len(prompts)} prompts</summary><ol>{items}</ol></details>" if prompts else ""
