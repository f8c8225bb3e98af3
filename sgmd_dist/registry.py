"""Finds objectives and model families by their module's name, so that adding one touches one file.

A plug-in module defines `Section`, the pydantic model of its part of a recipe, and a factory that its layer
documents (`sgmd_dist.objectives.base`, `sgmd_dist.models.base`).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from types import ModuleType

from sgmd_dist.errors import UserError

OBJECTIVES = "objectives"
MODELS = "models"


def available(kind: str) -> list[str]:
    """Names of the plug-ins in `sgmd_dist.<kind>`, sorted; `base` and `_private` modules are none."""
    spec = importlib.util.find_spec(f"sgmd_dist.{kind}")
    assert spec is not None and spec.submodule_search_locations is not None
    found = (info.name for info in pkgutil.iter_modules(spec.submodule_search_locations))
    return sorted(name for name in found if name != "base" and not name.startswith("_"))


def load(kind: str, name: str) -> ModuleType:
    """The plug-in module `sgmd_dist.<kind>.<name>`.

    Raises:
        UserError: there is no such plug-in; the message lists those that exist and the nearest name.
    """
    names = available(kind)
    if name not in names:
        raise UserError(f"no such name in sgmd_dist/{kind}; {allowed(str(name), names)}")
    return importlib.import_module(f"sgmd_dist.{kind}.{name}")


def allowed(wrong: str, choices: list[str]) -> str:
    """The tail of a message about a wrong name: what is allowed, and the nearest to what was written."""
    return f"allowed: {', '.join(choices)}{nearest(wrong, choices)}"


def nearest(wrong: str, choices: list[str]) -> str:
    """ "; did you mean 'x'?" with the choice that is nearest to what was written, or nothing."""
    near = difflib.get_close_matches(wrong, choices, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
