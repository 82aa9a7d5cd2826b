"""Recipes: TOML files with the settings of a run. Those of the package are known by name."""

from __future__ import annotations

from pathlib import Path

import mulligan
from mulligan.common.suggest import did_you_mean

RECIPES = Path(mulligan.__file__).parent / "recipes"


def recipe_file(recipe: Path) -> Path:
    """The file if there is one, or else the package's recipe of this name: `frozenlake-3x3`, or
    `recipes/frozenlake-3x3.toml`.

    Raises ValueError if there is neither.
    """
    known = {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
    name = recipe.name.removesuffix(".toml")
    if recipe.exists() and not (recipe.is_dir() and name in known):
        return recipe
    if recipe.parent in (Path(), Path("recipes")) and name in known:
        return known[name]
    nearest = did_you_mean(name, known) or f"; there are: {', '.join(known)}"
    raise ValueError(f"no such file, and no recipe of this name{nearest}")
