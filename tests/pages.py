"""Reads the README and the pages of docs: their commands, links and words."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from commands import REPO

RUNNABLE = "<!-- runnable -->"
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r"```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A page. What stands in `text` between fences is shown, not run, unless `RUNNABLE` stands before it."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        return str(self.path.relative_to(REPO))

    def commands(self) -> list[str]:
        """The indented lines, without their comments."""
        lines = _FENCED.sub("", self.text).splitlines()
        return [_command(line) for line in lines if line.startswith("    ") and line.strip()]

    def runnable(self) -> list[str]:
        """What stands in the blocks behind `RUNNABLE`: commands one by one, fenced Python whole."""
        found: list[str] = []
        for rest in self.text.split(f"{RUNNABLE}\n")[1:]:
            block = rest.strip("\n")
            if block.startswith("```python"):
                match = _PYTHON.match(block)
                assert match is not None, f"{self.name}: a fence that does not end"
                found.append(match[1])
            else:
                indented = re.match(r"(?:    .*\n?|\n(?=    ))+", block)
                assert indented is not None, f"{self.name}: {RUNNABLE} stands before no block: {block[:80]}"
                found += [_command(line) for line in textwrap.dedent(indented[0]).splitlines() if line.strip()]
        return found

    def anchors(self) -> set[str]:
        """What `#...` of a link may be: the headings, as GitHub names them."""
        headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", self.text), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def links(self) -> list[str]:
        """The targets of links and pictures that are files of the repository."""
        found = re.findall(r"\]\(([^)\s]+)\)", _FENCED.sub("", self.text))
        return [target for target in found if not re.match(r"https?://", target)]

    def quoted(self) -> list[str]:
        """What stands in backticks."""
        return re.findall(r"`([^`\n]+)`", _FENCED.sub("", self.text))


def pages() -> list[Page]:
    """The README and all of docs."""
    paths = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
    return [Page(path, path.read_text(encoding="utf-8")) for path in paths]


def page(name: str) -> Page:
    """The page of that name, as `docs/quickstart.md`."""
    return next(page for page in pages() if page.name == name)


def _command(line: str) -> str:
    return re.sub(r"\s+# .*", "", line).strip()
