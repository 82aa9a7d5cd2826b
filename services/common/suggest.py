"""Suggestions for misspelt names, and validation errors of settings in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

WHOLE = "settings"  # the name of a problem that is not about one setting
_UNKNOWN = "extra_forbidden"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'steps'?`, or "" if no name is similar."""
    names = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def problems(
    error: ValidationError, model: type[BaseModel], owner: str = "", others: Iterable[str] = ()
) -> dict[str, str]:
    """Errors in settings of `model`, by the name of the setting. Unknown names come first, since a setting that seems
    to be missing may only be misspelt. `owner` is whose settings they are, such as "loss 'ppo'"; `others` are names
    that are known beside the model's."""
    items = sorted(error.errors(), key=lambda item: item["type"] != _UNKNOWN)
    found: dict[str, str] = {}
    for item in items:
        path = [str(part) for part in item["loc"]]
        said = item["msg"]
        if item["type"] == _UNKNOWN:
            known = [*(others if len(path) == 1 else ()), *_fields(model, path[:-1])]
            said = f"no such setting{' of ' + owner if owner else ''}{did_you_mean(path[-1], known)}"
            if known and "did you mean" not in said:
                said += f"; there are: {', '.join(known)}"
        found.setdefault(_place(item["loc"]) or WHOLE, said)
    return found


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
