"""The page of an evaluation: whole in one file, and shown by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sgmd_dist.decode import write_video
from sgmd_dist.report.curves import Chart
from sgmd_dist.report.page import Clip, Page, render

SCORES = {"before": {"swd": 0.5, "jitter": 0.25}, "after": {"swd": 0.125, "jitter": 0.5}, "teacher": {"swd": 0.0625}}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Four frames of 96 x 32 pixels."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    rgb = torch.arange(4, dtype=torch.uint8).mul(60).reshape(4, 1, 1, 1).expand(-1, 32, 96, 3)
    write_video(path, rgb, 8)
    return path.read_bytes()


@pytest.fixture(scope="module")
def page(mp4: bytes) -> str:
    return render(
        Page(
            title="a run & its <scores>",
            subtitle="sgmd",
            scores=SCORES,
            names=("swd", "motion_ratio", "jitter"),
            columns=["teacher, 20 steps", "before, 4 steps", "after, 4 steps"],
            clips=[Clip("a red ball " + "x" * 300, mp4), Clip("</figcaption><script>alert(1)</script>", mp4)],
            curves=[Chart("Losses", {"a": [(1, 1.0), (2, 3.0)]}), Chart("Norms", {"b": [(1, 2.0), (2, 2.5)]})],
            facts={"Protocol": {"seeds": [1, 2], "teacher": "abc", "real": None}},
            prompts=["a red ball", "a blue bar " + "x" * 300],
        )
    )


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_text(page: str) -> None:
    parser = _Tags()
    parser.feed(page)
    names = [tag for tag, _ in parser.found]
    assert names.count("video") == 2 and names.count("svg") == 2 and names.count("table") == 1
    assert not {"script", "link", "img", "iframe"} & set(names)
    sources = [attributes["src"] for _, attributes in parser.found if "src" in attributes]
    assert all(source is not None and source.startswith("data:video/mp4;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import", page)


def test_the_table_has_a_row_per_score_that_there_is(page: str) -> None:
    rows = re.findall(r"<tr><td>(\w+)<small>.*?</td>(.*?)</tr>", page)
    assert [name for name, _ in rows] == ["swd", "jitter"], "nobody has a motion_ratio"
    assert [re.findall(r">([\d.]*)</td>", cells)[:3] for _, cells in rows] == [
        ["0.500", "0.125", "0.062"],
        ["0.250", "0.500", ""],
    ]


# Says of each video what the browser made of it, when everything is loaded.
_PROBE = """<script>
window.onload = () => {
  for (const video of document.querySelectorAll("video")) {
    const canvas = document.createElement("canvas");
    canvas.getContext("2d").drawImage(video, 0, 0);
    const shade = canvas.getContext("2d").getImageData(1, 1, 1, 1).data;
    const found = [video.readyState, video.videoWidth, video.videoHeight, video.error, shade[3]];
    video.setAttribute("probe", found.join(" "));
    video.removeAttribute("src");
  }
  const charts = [...document.querySelectorAll("svg")].map(svg => Math.round(svg.getBoundingClientRect().height));
  document.body.setAttribute("charts", charts.join(" "));
  document.body.setAttribute("overflows", document.documentElement.scrollWidth > window.innerWidth);
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
def test_chromium_shows_table_charts_and_plays_the_videos(page: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/chromium"]
    done = subprocess.run(
        [str(CHROMIUM), *options, "--window-size=1100,900", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    dom = done.stdout
    probes = [probe.split(" ") for probe in re.findall(r'probe="([^"]*)"', dom)]
    assert len(probes) == 2
    for ready_state, width, height, error, alpha in probes:
        assert int(ready_state) >= 2, "a frame is there"
        assert (width, height, error, alpha) == ("96", "32", "", "255")
    (heights,) = re.findall(r'charts="([^"]*)"', dom)
    assert len(heights.split()) == 2 and all(int(height) > 100 for height in heights.split())
    assert 'overflows="false"' in dom
    assert dom.count("<tr>") == 3 and "a run &amp; its &lt;scores&gt;</h1>" in dom
