"""The README and the pages of docs: no link, path or message in them is a dead one, and none is an orphan."""

from __future__ import annotations

import ast
import glob
import re
from functools import cache

import pytest
from commands import REPO
from pages import Page, page, pages
from test_recipe_errors import WRONG_FILES, WRONG_VALUES

from sgmd_dist import recipe_reference

FOLDERS = ("docs", "kernels", "launch", "recipes", "sgmd_dist", "tests")
GAP = "…"  # what stands in a message for names, numbers and reasons
by_name = pytest.mark.parametrize("one", pages(), ids=lambda one: one.name)


# Links


@by_name
def test_every_link_leads_to_a_file_and_a_heading(one: Page) -> None:
    for target in one.links():
        name, _, anchor = target.partition("#")
        path = (one.path.parent / name).resolve() if name else one.path
        assert path.exists(), f"{one.name}: {target}: there is no {path}"
        if anchor:
            assert anchor in Page(path, path.read_text(encoding="utf-8")).anchors(), f"{one.name}: {target}"


def test_the_readme_links_to_every_page() -> None:
    linked = {(REPO / target.partition("#")[0]).resolve() for target in page("README.md").links()}
    assert [one.name for one in pages() if one.name != "README.md" and one.path not in linked] == []


def test_the_readme_s_table_lists_every_page_once() -> None:
    listed = re.findall(r"^\| \[(docs/\w+\.md)\]", page("README.md").text, re.MULTILINE)
    assert sorted(listed) == sorted(one.name for one in pages() if one.name.startswith("docs/"))


@by_name
def test_every_path_in_backticks_is_there(one: Page) -> None:
    """Files, folders and patterns below `FOLDERS`, a test's name behind that of its neighbour, and modules."""
    for quoted in one.quoted():
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*", quoted):
            assert glob.glob(str(REPO / quoted)), f"{one.name}: there is no {quoted}"
        elif re.fullmatch(r"test_\w+\.py", quoted):
            assert list((REPO / "tests").rglob(quoted)), f"{one.name}: there is no {quoted}"
        elif re.fullmatch(r"(?:sgmd_dist|sgmd_kernels)(?:\.\w+)+", quoted):
            assert any(places_of_module(quoted)), f"{one.name}: there is no {quoted}"


def places_of_module(dotted: str) -> list[bool]:
    """Whether `dotted` is a module, or its parent is one that has the name."""
    root = REPO / ("kernels" if dotted.startswith("sgmd_kernels") else ".")
    path = root / dotted.replace(".", "/")
    parent, name = path.parent.with_suffix(".py"), path.name
    within = parent.is_file() and re.search(rf"\b{name}\b", parent.read_text(encoding="utf-8")) is not None
    return [path.is_dir(), path.with_suffix(".py").is_file(), within]


# The recipes' page


def test_the_recipes_page_is_what_the_sections_say() -> None:
    assert page("docs/recipes.md").text == recipe_reference.reference(), (
        "run: python -m sgmd_dist.recipe_reference > docs/recipes.md"
    )


def test_every_key_is_described() -> None:
    assert recipe_reference.undescribed() == [], "say in the section's docstring what the key is, or in PLAIN_KEYS"


def test_no_description_is_of_a_key_that_is_gone() -> None:
    text = recipe_reference.reference()
    assert [key for key, words in recipe_reference.PLAIN_KEYS.items() if f"| {words}" not in text] == []


# The messages' page


def quoted_messages() -> list[str]:
    """The first cells of the tables in docs/troubleshooting.md."""
    return re.findall(r"^\| `(.+?)` \|", page("docs/troubleshooting.md").text, re.MULTILINE)


@cache
def texts_of_the_code() -> list[str]:
    """Every text of the code, its parts that are computed as GAP, and the messages of the table of wrong recipes."""
    found = [message for _, message in [*WRONG_VALUES, *WRONG_FILES]]
    for folder in ("sgmd_dist", "launch", "kernels"):
        for path in (REPO / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@pytest.mark.parametrize("message", quoted_messages())
def test_a_message_of_the_page_is_one_of_the_code(message: str) -> None:
    parts = [re.escape(part.strip()) for part in message.split(GAP) if part.strip()]
    assert parts, "a message of gaps"
    assert any(re.search(".*".join(parts), text, re.DOTALL) for text in texts_of_the_code()), message


def test_the_page_has_the_common_messages() -> None:
    assert len(quoted_messages()) > 40
