"""Filters as people type them: the words of the console's addresses, such as `role=first from=0.5 fell into`."""

from __future__ import annotations

import re
from math import isfinite

from mulligan.common.suggest import did_you_mean
from mulligan.console.index import ExperienceFilter
from mulligan.console.reading import real, wanted_of, whole

NAMES = {
    "step": "a training step, from 0",
    "slot": "a group of a step, from 0",
    "role": "has a sample of this role",
    "outcome": "of the first sample",
    "environment": "",
    "from": "the least reward of the first sample",
    "to": "the largest reward of it",
    "text": "words; the same as words without a name",
}
_WORD = re.compile(r'(?:(?P<name>\w+)=)?(?:"(?P<quoted>[^"]*)"|(?P<plain>\S+))')


class BadFilter(ValueError):
    """The text is no filter; the message says why."""


def wanted_by(run: str, typed: str) -> ExperienceFilter:
    """Raises BadFilter."""
    given: dict[str, str] = {}
    words: list[str] = []
    for found in _WORD.finditer(typed):
        name, value = found["name"], found["quoted"] if found["quoted"] is not None else found["plain"]
        if name is None or name == "text":
            words.append(value)
        elif name not in NAMES:
            near = did_you_mean(name, NAMES) or f"; there are {', '.join(NAMES)}."
            raise BadFilter(f'no filter is named {name!r}{near} To search for it as text: "{found[0]}"')
        elif name in given:
            raise BadFilter(f"{name} is given twice: expected one value")
        else:
            _check(name, value)
            given[name] = value
    if nameless := re.search(r"(?:^|\s)(\w+)=(?=\s|$)", typed):
        raise BadFilter(f"{nameless[1]}= has no value")
    return wanted_of(run, {**given, "text": " ".join(words)})


def _check(name: str, value: str) -> None:
    if name in ("step", "slot") and not ((number := whole(value)) is not None and number >= 0):
        raise BadFilter(f"{name}={value}: expected a whole number from 0")
    if name in ("from", "to") and not ((reward := real(value)) is not None and isfinite(reward)):
        raise BadFilter(f"{name}={value}: expected a number, such as 0.5")


def typed_of(wanted: ExperienceFilter) -> str:
    """The text that gives this filter."""
    values = {
        "step": wanted.step,
        "slot": wanted.slot,
        "role": wanted.role,
        "outcome": wanted.outcome,
        "environment": wanted.environment,
        "from": wanted.reward_from,
        "to": wanted.reward_to,
    }
    named = [f"{name}={_quoted(value)}" for name, value in values.items() if value not in (None, "")]
    return " ".join([*named, *(f'"{word}"' if "=" in word else word for word in wanted.text.split())])


def _quoted(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f'"{text}"' if re.search(r"\s", text) else text
