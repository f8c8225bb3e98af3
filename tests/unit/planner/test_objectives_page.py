"""docs/objectives.md against the code: passes and memory of every objective, and the keys of each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sgmd_dist import registry
from sgmd_dist.assemble import build_objective
from sgmd_dist.objectives._distillation import DistillationSection
from sgmd_dist.planner.machine import GIB, Machine
from sgmd_dist.planner.plan import make_plan
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.schedule import Schedule

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
DISTILLATIONS = sorted(set(registry.available(registry.OBJECTIVES)) - {"flow_matching"})


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its first two lines."""
    _, _, section = PAGE.partition(f"\n{heading}\n")
    rows = re.search(r"(?:^\|.*\n)+", section.split("\n## ")[0], re.MULTILINE)
    assert rows is not None, f"docs/objectives.md has no table under '{heading}'"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.group().splitlines()[2:]]


def name_in(cell: str) -> str:
    """`sgmd` of "`sgmd`", "`dmd2` with `gan`" and "`{name: sgmd, inner_sample: reuse}`"."""
    found = re.match(r"`(?:\{name: )?(\w+)", cell)
    assert found is not None, cell
    return found.group(1)


COSTS = table("## What a step costs")


def costs_of(objective: str) -> list[str]:
    """A row of the costs, of `recipes/sgmd.yaml` with this `objective`."""
    plan = make_plan(load_recipe(ROOT / "recipes/sgmd.yaml", [f"objective={objective}"]), Machine(8, 8, 80))
    means = [plan.passes[role][0] for role in ("generator", "teacher", "fake_score")]
    fullest = max((phase.moment for phase in plan.phases), key=lambda moment: moment.activations)
    numbers = [f"{mean:g}" for mean in [*means, sum(means)]]
    memory = [f"{number / GIB:.1f}" for number in (fullest.activations, plan.peak_bytes)]
    return [f"`{objective}`", *numbers, *memory, "yes" if plan.fits else "no", fullest.what.replace("_", " ")]


@pytest.mark.parametrize("row", COSTS, ids=[row[0].strip("`") for row in COSTS])
def test_the_page_tells_what_a_step_costs(row: list[str]) -> None:
    expected = costs_of(row[0].strip("`"))
    assert row == expected, f"the row should be\n| {' | '.join(expected)} |"


@pytest.mark.parametrize("heading", ["## What the generator minimizes", "## What a step costs", "## What it takes"])
def test_every_objective_is_on_the_page(heading: str) -> None:
    missing = set(DISTILLATIONS) - {name_in(row[0]) for row in table(heading)}
    rows = [f"| {' | '.join(costs_of(f'{{name: {name}}}'))} |" for name in sorted(missing)]
    assert not missing, f"add to '{heading}' rows of {missing}; of the costs:\n" + "\n".join(rows)


def test_the_page_tells_who_differentiates_the_teacher() -> None:
    for row in table("## What it takes"):
        if name_in(row[0]) in DISTILLATIONS:
            objective = build_objective(
                load_recipe(ROOT / "recipes/sgmd.yaml", [f"objective={{name: {name_in(row[0])}}}"])
            )
            of_teacher = {p.gradient for phase in objective.phases(0) for p in phase.passes if p.role == "teacher"}
            assert (row[4] == "yes") == ("input" in of_teacher), row


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_the_page_lists_every_key_of_an_objectives_own_with_its_default(name: str) -> None:
    fields = registry.load(registry.OBJECTIVES, name).Section.model_fields
    shared = DistillationSection.model_fields
    own = {key for key in fields if key != "name" and (key not in shared or fields[key].default != shared[key].default)}
    listed = {row[1].strip("`"): row[2] for row in table("## Keys") if name_in(row[0]) == name}
    assert listed.keys() == own
    for key, default in listed.items():
        value = fields[key].default
        if isinstance(value, Schedule):
            assert default == f"{value.at(0)} *", key


def test_the_page_lists_the_keys_that_all_have() -> None:
    paragraph = PAGE.partition("\n## Keys\n")[2].partition("\n|")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == set(DistillationSection.model_fields) - {"name"}
