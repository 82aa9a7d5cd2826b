"""Recipes: TOML files with a run's settings. Those that come along are known by name."""

from __future__ import annotations

from pathlib import Path

import mulligan
from mulligan.common.suggest import did_you_mean

RECIPES = Path(mulligan.__file__).parent / "recipes"


def recipe_file(recipe: Path) -> Path:
    """A file of this name, or else the recipe that comes along: `frozenlake-3x3`, also written as
    `recipes/frozenlake-3x3.toml`. Raises ValueError if there is neither."""
    if recipe.exists():
        return recipe
    known = {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
    name = recipe.name.removesuffix(".toml")
    if recipe.parent in (Path(), Path("recipes")) and name in known:
        return known[name]
    nearest = did_you_mean(name, known) or f"; those that come along: {', '.join(known)}"
    raise ValueError(f"no such file, and no recipe of this name comes along{nearest}")
