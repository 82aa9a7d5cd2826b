"""`--set NAME=VALUE`, and other options of this form."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from mulligan.cli.out import fail
from mulligan.common.secret_flags import has_password


def read_overrides(overrides: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """The settings by name. A value is read as TOML, else as a string; a date is a string, too. Ends the program if an
    override is not NAME=VALUE."""
    found: dict[str, Any] = {}
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name:
            fail(f"{option} {override}: expected NAME=VALUE", 2)
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if has_password(text):
            fail(f"{option} {name}: has a password, and other users see options", 2)
        found[name] = value if isinstance(value, bool | int | float | str | list | dict) else text
    return found
