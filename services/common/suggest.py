"""The nearest right name for one that is wrong, and what is wrong with settings, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_UNKNOWN = "extra_forbidden"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'steps'?`, or "" where nothing is near."""
    names = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def problems(error: ValidationError, model: type[BaseModel]) -> dict[str, str]:
    """What is wrong with settings of `model`, by the setting's name. Names that there are not come first: what seems to
    be missing may only be written wrongly."""
    items = sorted(error.errors(), key=lambda item: item["type"] != _UNKNOWN)
    found: dict[str, str] = {}
    for item in items:
        path = [str(part) for part in item["loc"]]
        said = item["msg"]
        if item["type"] == _UNKNOWN:
            known = _fields(model, path[:-1])
            said = f"no such setting{did_you_mean(path[-1], known)}"
            if known and "did you mean" not in said:
                said += f"; there are: {', '.join(known)}"
        found.setdefault(".".join(path) or "settings", said)
    return found


def _fields(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """The settings of the table at `path`; none where that is no table of ours."""
    fields: Mapping[str, Any] = model.model_fields
    for name in path:
        annotation = fields[name].annotation if name in fields else None
        tables = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
        fields = tables[0].model_fields if tables else {}
    return list(fields)
