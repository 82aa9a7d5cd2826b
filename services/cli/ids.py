"""Ids as people type them: a unique beginning is enough."""

from __future__ import annotations

from collections.abc import Iterable

from mulligan.cli.out import fail
from mulligan.common.suggest import did_you_mean

_SHOWN = 10


def whole_id(given: str, known: Iterable[str], what: str) -> str:
    """The id that begins with `given`. If there is none or more than one, ends the program with status 1."""
    ids = list(dict.fromkeys(known))
    if given in ids:
        return given
    found = [one for one in ids if given and one.startswith(given)]
    if not found:
        there = f"; there are: {', '.join(ids[:_SHOWN])}" if ids else "; there is none"
        fail(f"no {what} {given!r}{did_you_mean(given, ids) or there}")
    if len(found) > 1:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        fail(f"{given!r} begins the ids of several: {', '.join(found[:_SHOWN])}{more}")
    return found[0]
