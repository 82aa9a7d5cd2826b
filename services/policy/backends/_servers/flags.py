"""Secrets among the flags of engines that are launched. Other users of the machine see flags."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from mulligan.common.secret_flags import has_password, is_secret_name

_WHOLE = frozenset({"--ssl-keyfile"})  # flags that begin as a secret one does, and are others
_SEEN = "other users see flags"


def check_flags(flags: Sequence[str], instead: Mapping[str, str]) -> None:
    """Raises ValueError, which quotes no value, for a flag that has a secret. `instead` has such flags of the engine,
    and what to do in their place. The engine takes their beginnings, too."""
    shown = "flags"
    for flag, following in zip_longest(flags, flags[1:], fillvalue="-"):
        value = flag
        if flag.startswith("--"):
            shown, has_value, value = flag.partition("=")
            _check_name(shown, bool(has_value) or not following.startswith("-"), instead)
        if has_password(value):
            raise ValueError(f"{shown}: {_SEEN}, and its value has a password: expected one without")
        if found := next(filter(is_secret_name, _names(value)), ""):
            raise ValueError(f"{shown}: {_SEEN}, and its value has {found}: expected it in a variable or a file")


def _check_name(shown: str, has_value: bool, instead: Mapping[str, str]) -> None:
    name = "--" + shown[2:].replace("_", "-").lower()
    known = _known(name, instead)
    if known == "--hf-token" and not has_value:
        return  # the token that is kept in a file of this user
    if known:
        also = "" if known == name else f" (or {known})"
        raise ValueError(f"{shown}{also}: {_SEEN}: {instead[known]} instead")
    if has_value and is_secret_name(name.rpartition(".")[2].lstrip("-")):
        raise ValueError(f"{shown}: {_SEEN}: set a variable, or name a file, that the engine reads it from instead")


def _known(name: str, instead: Mapping[str, str]) -> str:
    """The flag of which this is the name, or its beginning."""
    if name in instead:
        return name
    if name in _WHOLE or name == "--":
        return ""
    return next((known for known in instead if known.startswith(name)), "")


def _names(value: str) -> Iterator[str]:
    """The names in a JSON object."""
    if not value.lstrip().startswith(("{", "[")):
        return
    try:
        yield from _within(json.loads(value))
    except (ValueError, RecursionError):
        return


def _within(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            if item:
                yield name
            yield from _within(item)
    elif isinstance(value, list):
        for item in value:
            yield from _within(item)
