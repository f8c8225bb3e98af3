"""docs/watching.md names every metric that the code has, and none besides."""

from __future__ import annotations

import re
from pathlib import Path

from sgmd_dist.alarms import WATCHED

REPO = Path(__file__).resolve().parents[2]
PREFIXES = "generator|fake_score|time|data|health|perf|passes"
IN_CODE = re.compile(rf'"((?:{PREFIXES})/[a-z_0-9/]+)"')
IN_PAGE = re.compile(rf"`((?:{PREFIXES})/[a-z_0-9/]+)`")
NOT_METRICS = {
    "health/motion": "what noise is drawn for",
    "data/clips": "a folder",
    "perf/flops_per_step": "made into a rate",
    "perf/tokens_per_sample": "made into a rate",
}
ROLES = ("generator", "fake_score")
COMPOSED = {
    *(f"time/{role}_s" for role in ROLES),
    *(f"{role}/{name}" for role in ROLES for name in ("grad_norm", "skipped")),
    *(f"passes/{role}" for role in ("teacher", *ROLES)),
    *(f"health/alarm/{name}" for name in WATCHED),
}


def test_the_page_names_the_metrics_that_there_are() -> None:
    sources = (path for path in (REPO / "sgmd_dist").rglob("*.py") if "benchmarks" not in path.parts)
    in_code = {name for path in sources for name in IN_CODE.findall(path.read_text(encoding="utf-8"))}
    in_page = set(IN_PAGE.findall((REPO / "docs/watching.md").read_text(encoding="utf-8")))
    assert (in_code | COMPOSED) - NOT_METRICS.keys() == in_page
