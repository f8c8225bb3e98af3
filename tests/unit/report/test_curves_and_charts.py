"""A run's metrics become curves, and curves become pictures."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from sgmd_dist.report.chart import line_chart, log_ticks, ticks
from sgmd_dist.report.curves import Chart, read_curves


def elements(svg_page: str, tag: str) -> list[ElementTree.Element]:
    """The elements of that tag, of a figure that is well-formed."""
    return list(ElementTree.fromstring(svg_page).iter(tag))


def points(polyline: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in polyline.attrib["points"].split()]  # type: ignore[misc]


# Reading


def test_curves_are_grouped_and_what_is_no_number_is_passed_over(tmp_path: Path) -> None:
    lines = [
        json.dumps({"step": 10, "fake_score/residual": 0.5, "generator/grad_norm": 2.0, "generator/skipped": 0.0}),
        json.dumps(
            {"step": 20, "fake_score/residual": math.nan, "fake_score/grad_norm": 3.0, "generator/skipped": 0.0}
        ),
        '{"step": 30, "fake_score/resid',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    charts = {chart.title: chart.curves for chart in read_curves(tmp_path / "metrics.jsonl")}
    assert list(charts) == ["Tracking residual of the fake score", "Gradient norms"], "nothing was skipped: no chart"
    (residual,) = charts["Tracking residual of the fake score"].values()
    assert residual[0] == (10.0, 0.5) and residual[1][0] == 20.0 and math.isnan(residual[1][1])
    assert charts["Gradient norms"] == {"generator/grad_norm": [(10.0, 2.0)], "fake_score/grad_norm": [(20.0, 3.0)]}


def test_a_run_without_metrics_has_no_curves(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "metrics.jsonl") == []


# Ticks


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (3, 97, [0, 20, 40, 60, 80, 100]), (-0.4, 0.4, [-0.4, -0.2, 0, 0.2, 0.4])],
)
def test_ticks_are_round_numbers_that_span_the_values(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_one_value_lie_on_both_sides() -> None:
    for value in (0.0, 5.0, -3e-7):
        found = ticks(value, value)
        assert found[0] < value < found[-1] and len(found) < 10


def test_ticks_of_a_logarithmic_axis_are_powers_of_ten() -> None:
    assert log_ticks(0.02, 30) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert len(log_ticks(1e-12, 1e12)) <= 7


# Drawing


def test_a_curve_goes_through_its_points_from_left_to_right_and_upwards() -> None:
    svg = line_chart(Chart("Losses", {"a": [(1, 0.0), (2, 1.0), (3, 4.0)]}))
    (line,) = elements(svg, "polyline")
    (x0, y0), (x1, y1), (x2, y2) = points(line)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y2) == pytest.approx(4 * (y0 - y1), abs=0.5), "values grow upwards, in proportion"


def test_a_missing_value_parts_the_curve_and_a_lone_point_is_a_dot() -> None:
    svg = line_chart(Chart("x", {"a": [(1, 1.0), (2, 2.0), (3, math.nan), (4, 3.0)]}))
    assert len(elements(svg, "polyline")) == 1 and len(elements(svg, "circle")) == 1


def test_values_over_a_wide_range_get_a_logarithmic_axis() -> None:
    (line,) = elements(line_chart(Chart("x", {"a": [(1, 0.01), (2, 1.0), (3, 100.0)]})), "polyline")
    (_, y0), (_, y1), (_, y2) = points(line)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_titles_and_names_are_text_whatever_they_hold() -> None:
    svg = line_chart(Chart("a < b & c", {'<i>"': [(1, 1.0), (2, 1.0)]}))
    assert "a < b & c" in "".join(elements(svg, "figcaption")[0].itertext())
    assert '<i>"' in "".join(elements(svg, "figcaption")[0].itertext())
