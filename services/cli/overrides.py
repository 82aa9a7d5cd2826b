"""`--set NAME=VALUE`, as several commands take it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from mulligan.cli.out import fail


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The settings by name. A value is read as TOML, else as a string; a date is a string, too. Ends the program if an
    override is not NAME=VALUE."""
    found: dict[str, Any] = {}
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name:
            fail(f"--set {override}: expected NAME=VALUE", 2)
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        found[name] = value if isinstance(value, bool | int | float | str | list | dict) else text
    return found
