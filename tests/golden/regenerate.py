"""Write the golden file of every shipped recipe: python tests/golden/regenerate.py

A golden file is a recipe's resolved form, every key with its value. Run this after a wanted change of a recipe or
of a default, and read the difference before you commit it.
"""

from __future__ import annotations

import sys
from pathlib import Path

GOLDEN_DIR = Path(__file__).resolve().parent
ROOT = GOLDEN_DIR.parents[1]
COMMAND = f"python {Path(__file__).resolve().relative_to(ROOT)}"


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from sgmd_dist.recipe_file import dump_recipe, load_recipe

    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    for stale in set(GOLDEN_DIR.glob("*.yaml")) - {GOLDEN_DIR / recipe.name for recipe in recipes}:
        stale.unlink()
    for recipe in recipes:
        (GOLDEN_DIR / recipe.name).write_text(dump_recipe(load_recipe(recipe)), encoding="utf-8")
    print(f"{GOLDEN_DIR}: {len(recipes)} files")


if __name__ == "__main__":
    main()
