"""Gymnasium's spaces as text: describes the values of a space, and writes observations in words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
from gymnasium import spaces

Space = spaces.Space[Any]
MAX_SHOWN = 4_096  # numbers of one observation
MAX_NAMED = 12  # bounds that are told one by one


@singledispatch
def words(space: Space) -> str:
    """Describes the JSON form of the space's values."""
    return f"a value of {type(space).__name__}"


@words.register
def _(space: spaces.Discrete) -> str:
    return _span(space.start, space.start + space.n - 1, whole=True)


@words.register
def _(space: spaces.MultiBinary) -> str:
    return _listed(space.shape, ["0 or 1"] * math.prod(space.shape))


@words.register
def _(space: spaces.MultiDiscrete) -> str:
    pairs = zip(np.ravel(space.start), np.ravel(space.nvec), strict=True)
    return _listed(space.shape, [_span(start, start + n - 1, whole=True) for start, n in pairs])


@words.register
def _(space: spaces.Box) -> str:
    bounds = zip(np.ravel(space.low), np.ravel(space.high), strict=True)
    return _listed(space.shape, [_span(low, high, whole=is_whole(space)) for low, high in bounds])


@words.register
def _(space: spaces.Text) -> str:
    letters = "".join(sorted(space.character_set))
    made_of = f", each one of {letters!r}" if len(letters) <= 100 else ""
    return f"a text of {space.min_length} to {space.max_length} characters{made_of}"


@words.register
def _(space: spaces.Dict) -> str:
    return "an object with " + "; ".join(f"{json.dumps(key)}: {words(part)}" for key, part in space.items())


@words.register(spaces.Tuple)
def _(space: Any) -> str:
    return "a list of: " + "; ".join(words(part) for part in space.spaces)


@words.register
def _(space: spaces.Sequence) -> str:
    return f"a list of any length, each element {words(space.feature_space)}"


@words.register(spaces.OneOf)
def _(space: Any) -> str:
    options = "; ".join(f"[{number}, {words(part)}]" for number, part in enumerate(space.spaces))
    return f"one of the lists {options}"


@words.register
def _(space: spaces.Graph) -> str:
    return f"a graph whose nodes are each {words(space.node_space)}"


def is_whole(space: Space) -> bool:
    return bool(np.dtype(space.dtype).kind != "f")


def check_observations(space: Space) -> None:
    """Raises ValueError if an array has too many numbers to be shown."""
    if isinstance(space, spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary):
        count = math.prod(space.shape)
        if count > MAX_SHOWN:
            raise ValueError(f"it observes arrays of {count} numbers, which no text can show: wrap it")
    for part in _parts(space):
        check_observations(part)


def component_count(space: Space) -> int:
    """How many components of an observation can be named; 0 for none."""
    if isinstance(space, spaces.Tuple):
        return len(space.spaces)
    is_array = isinstance(space, spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary)
    return space.shape[0] if is_array and space.shape is not None and len(space.shape) == 1 else 0


def show_named(space: Space, value: Any, digits: int, names: Sequence[str]) -> str:
    """A line for each component."""
    if isinstance(space, spaces.Tuple):
        shown = [show(part, one, digits) for part, one in zip(space.spaces, value, strict=True)]
    else:
        shown = [_number(one, digits) for one in value]
    return "\n".join(_entry(name, text) for name, text in zip(names, shown, strict=True))


@singledispatch
def show(space: Space, value: Any, digits: int) -> str:
    """A value in words. Numbers have `digits` significant digits."""
    return str(value).encode("utf-8", "replace").decode()


@show.register(spaces.Discrete)
@show.register(spaces.MultiDiscrete)
@show.register(spaces.MultiBinary)
@show.register(spaces.Box)
def _(space: Space, value: Any, digits: int) -> str:
    return _array(np.asarray(value), digits)


@show.register
def _(space: spaces.Dict, value: Any, digits: int) -> str:
    return "\n".join(_entry(key, show(part, value[key], digits)) for key, part in space.items())


@show.register(spaces.Tuple)
def _(space: Any, value: Any, digits: int) -> str:
    shown = [show(part, one, digits) for part, one in zip(space.spaces, value, strict=True)]
    is_short = all("\n" not in text for text in shown)
    return f"({', '.join(shown)})" if is_short else "\n".join(shown)


@show.register
def _(space: spaces.Sequence, value: Any, digits: int) -> str:
    if space.stack:
        return show(space.stacked_feature_space, value, digits)
    return "\n".join(show(space.feature_space, one, digits) for one in value) or "(none)"


@show.register(spaces.OneOf)
def _(space: Any, value: Any, digits: int) -> str:
    which = int(value[0])
    return _entry(str(which), show(space.spaces[which], value[1], digits))


@show.register
def _(space: spaces.Graph, value: Any, digits: int) -> str:
    found = {"nodes": value.nodes, "edges": value.edges, "links": value.edge_links}
    return "\n".join(_entry(key, _array(np.asarray(one), digits)) for key, one in found.items() if one is not None)


def _parts(space: Space) -> Sequence[Space]:
    if isinstance(space, spaces.Dict):
        return list(space.values())
    return space.spaces if isinstance(space, spaces.Tuple | spaces.OneOf) else ()


def _entry(key: str, text: str) -> str:
    return f"{key}:\n  " + text.replace("\n", "\n  ") if "\n" in text else f"{key}: {text}"


def _array(array: np.ndarray[Any, Any], digits: int) -> str:
    """A number, a list, or a line for each row."""
    if array.ndim == 0:
        return _number(array, digits)
    if array.ndim == 1:
        return f"[{', '.join(_number(one, digits) for one in array)}]"
    return ("\n" * (array.ndim - 1)).join(_array(part, digits) for part in array)


def _number(value: Any, digits: int) -> str:
    is_float = np.asarray(value).dtype.kind == "f"
    return format(float(value), f".{digits}g") if is_float else str(int(value))


def _span(low: Any, high: Any, *, whole: bool) -> str:
    if whole:
        return f"a whole number from {int(low)} to {int(high)}"
    lower = f"{float(low):.6g}"
    upper = f"{float(high):.6g}"
    if math.isinf(low):
        return "a number" if math.isinf(high) else f"a number of at most {upper}"
    return f"a number of at least {lower}" if math.isinf(high) else f"a number from {lower} to {upper}"


def _listed(shape: Sequence[int], spans: Sequence[str]) -> str:
    """An array: its shape, and what its elements are."""
    if not shape:
        return spans[0]
    form = f"a list of {len(spans)}" if len(shape) == 1 else f"nested lists of shape {' x '.join(map(str, shape))}"
    if len(set(spans)) == 1:
        return f"{form}, each {spans[0]}" if len(spans) > 1 else f"{form}: {spans[0]}"
    if len(spans) <= MAX_NAMED:
        return f"{form}: {'; '.join(spans)}"
    return f"{form}, the first ones {'; '.join(spans[:MAX_NAMED])}"
