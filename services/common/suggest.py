"""Suggestions for misspelt names, and validation errors of settings in plain words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

WHOLE = "settings"  # the name of a problem that is not about one setting
_UNKNOWN = "extra_forbidden"
_SETTING = "setting"  # of `bad_setting`
_ONE_OF = ("enum", "literal_error")  # their messages quote what there is
_QUOTED = re.compile(r"'([^']*)'")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'steps'?`, or "" if no name is similar."""
    names = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def problems(
    error: ValidationError,
    model: type[BaseModel],
    owner: str = "",
    owners: Callable[[str], Sequence[str]] = lambda setting: (),
) -> dict[str, str]:
    """Errors in settings of `model`, by the name of the setting. Unknown names come first, since a setting that seems
    to be missing may only be misspelt. `owner` is whose settings they are, such as "loss 'ppo'"; `owners` tells who
    else has a setting of some name."""
    items = sorted(error.errors(), key=lambda item: item["type"] != _UNKNOWN)
    found: dict[str, str] = {}
    for item in items:
        path = [str(part) for part in item["loc"]]
        named: tuple[str, ...] = ()
        said = item["msg"]
        if item["type"] == _UNKNOWN:
            said = f"no such setting{' of ' + owner if owner else ''}"
            said += _instead(path[-1], _fields(model, path[:-1]), owners(path[-1]) if len(path) == 1 else ())
        elif item["type"] == _SETTING:
            named = (item["ctx"]["setting"],)
            said = item["ctx"]["problem"]
        elif item["type"] in _ONE_OF:
            said += did_you_mean(str(item["input"]), _QUOTED.findall(said))
        found.setdefault(_place([*item["loc"], *named]) or WHOLE, said)
    return found


def bad_setting(setting: str, problem: str) -> PydanticCustomError:
    """For a validator of a whole model to raise, where one setting of it is what is wrong."""
    return PydanticCustomError(_SETTING, "{setting}: {problem}", {"setting": setting, "problem": problem})


def _instead(setting: str, known: Sequence[str], owners: Sequence[str]) -> str:
    """What the person may have meant by an unknown setting."""
    if owners:
        return f"; these have it: {', '.join(owners)}"
    near = did_you_mean(setting, known)
    return near or (f"; there are: {', '.join(known)}" if known else "")


def _place(path: Iterable[str | int]) -> str:
    """`a.b[0].c`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _fields(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """The settings in the table at `path`; empty if that is no table."""
    fields: Mapping[str, Any] = model.model_fields
    for name in path:
        annotation = fields[name].annotation if name in fields else None
        tables = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
        fields = tables[0].model_fields if tables else {}
    return list(fields)
