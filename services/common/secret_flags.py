"""Finds secrets among settings that were given as flags. Other users of the machine see flags in its list of
processes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr

# What a URL says of its user, with a password; and where libpq takes one in a query.
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@|[?&](?:ssl)?password=[^&\s]", re.IGNORECASE)
_SECRET = re.compile(
    r"(?:\w+_)?(?:api_?key|access_?key|secret_?key|secret|password|passwd|credentials?)"
    r"|(?:\w+_)?(?:api|access|auth|bearer|hf|hub|secret|session)_?token|token|key"
)
_SECRET_VARIABLE = re.compile(r"(?:[A-Z0-9]+_)*(?:KEY|TOKEN|SECRET|PASSWORD)")  # as HF_TOKEN


def secret_fields(model: type[BaseModel]) -> frozenset[str]:
    """The settings of a model and its tables that are secrets, by dotted name."""
    found = set()
    for name, field in model.model_fields.items():
        for kind in _parts(field.annotation):
            if kind is SecretStr:
                found.add(name)
            elif _is_model(kind):
                found |= {f"{name}.{inner}" for inner in secret_fields(kind)}
    return frozenset(found)


def has_setting(model: type[BaseModel], name: str) -> bool:
    """Whether there is a setting with this dotted name."""
    annotation: Any = model
    for key in name.split("."):
        annotation = _below(annotation, key)
    return annotation is not None


def secrets_among(model: type[BaseModel], given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of what was given for a model, the settings by dotted name that must not be flags, and why."""
    for name, value in given.items():
        yield from _among(name, _below(model, name), value)


def has_password(text: str) -> bool:
    """Whether it is, or has, a URL with a password."""
    return _PASSWORD.search(text) is not None


def is_secret_name(name: str) -> bool:
    """Whether what has this name, in some other program, is a secret."""
    return _SECRET.fullmatch(name.replace("-", "_").lower()) is not None


def _among(name: str, annotation: Any, value: Any) -> Iterator[tuple[str, str]]:
    if SecretStr in _parts(annotation):
        if value is not None:
            yield name, "is a secret"
        return
    value = _read(value)
    if isinstance(value, str):
        if has_password(value):
            yield name, "has a password"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            is_variable = name.rpartition(".")[2] == "environment"  # of a process
            if is_variable and item and _SECRET_VARIABLE.fullmatch(key):
                yield f"{name}.{key}", "is a secret"
            yield from _among(f"{name}.{key}", _below(annotation, key), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _among(name, _below(annotation, ""), item)


def _read(value: Any) -> Any:
    """A table or list that was given as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _below(annotation: Any, key: str) -> Any:
    """The annotation of a model's field, or of the items of a dictionary or a list; None if there is none."""
    for kind in _parts(annotation):
        if _is_model(kind) and key in kind.model_fields:
            return kind.model_fields[key].annotation
        if get_origin(kind) in (dict, list, tuple):
            return get_args(kind)[1 if get_origin(kind) is dict else 0]
    return None


def _parts(annotation: Any) -> list[Any]:
    """What an annotation may be, without `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _parts(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [part for one in get_args(annotation) for part in _parts(one)]
    return [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
