"""The settings of runs as flat names, and how those of several differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence


def flat(settings: Mapping[str, object]) -> dict[str, str]:
    """By names such as `rollout.max_tokens`, as JSON."""
    return dict(_flat(settings, ""))


def _flat(settings: Mapping[str, object], begin: str) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{begin}{name}.")
        else:
            yield f"{begin}{name}", value if isinstance(value, str) else json.dumps(value)


def differences(settings: Sequence[Mapping[str, object]]) -> list[tuple[str, list[str]]]:
    """The names whose values differ, each with its value in each run; "" where a run has none."""
    found = [flat(one) for one in settings]
    names = dict.fromkeys(name for one in found for name in one)
    rows = [(name, [one.get(name, "") for one in found]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def grouped(settings: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """By the first part of the names: the groups without it, and first, under "", those that are no table's."""
    found: dict[str, dict[str, str]] = {"": {}}
    for name, value in settings.items():
        table, _, rest = name.partition(".")
        found.setdefault(table if rest else "", {})[rest or name] = value
    return {table: values for table, values in found.items() if values}
