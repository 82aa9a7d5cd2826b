"""Actions of Gymnasium's spaces, read from an agent's answer.

An action is JSON: numbers, lists and objects in the structure of its space. It stands between triple backticks, else
between <answer> and </answer> or in a box, else it is the whole answer. A discrete action may have a name; without one
it is the last number. In a space of texts, the action is the whole answer. Values are never adjusted: what is out of
bounds raises a ValueError that says what was expected.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any, NoReturn

import numpy as np
from gymnasium import spaces

from mulligan.common.thoughts import without_thoughts
from mulligan.env.answers import fenced, last_number, marked
from mulligan.env.envs.gymnasium.spaces import Space, is_whole, words
from mulligan.env.tool_calls import printable

_MAX_ANSWER = 20_000  # characters of an action
_MAX_READING = 200
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_AROUND_A_NAME = " .,;:!*_`'\"\n"
_LEAVES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Box, spaces.Text)


def check(space: Space) -> None:
    """Raises ValueError if answers cannot express the values of the space."""
    parts: Sequence[Space] = ()
    if isinstance(space, spaces.Dict):
        parts = list(space.values())
    elif isinstance(space, spaces.Tuple | spaces.OneOf):
        parts = space.spaces
    elif isinstance(space, spaces.Sequence) and not space.stack:
        parts = [space.feature_space]
    elif not isinstance(space, _LEAVES):
        raise ValueError(f"its actions cannot be written as text: there is a {type(space).__name__} space in them")
    for part in parts:
        check(part)


def form(space: Space, names: Sequence[str]) -> str:
    """Describes an action in words. `names` are the names of discrete actions, in order."""
    if isinstance(space, spaces.Discrete) and names:
        return f"{', '.join(names)} (or {words(space)})"
    return words(space)


def read(space: Space, answer: str, names: Sequence[str]) -> Any:
    """The action in an answer, as a sample of the space. Raises ValueError with a message for the agent."""
    said = without_thoughts(answer)
    if isinstance(space, spaces.Text):
        return _decode(space, said, "the answer")
    text = _written(said)
    if len(text) > _MAX_ANSWER:
        raise ValueError(f"it is longer than {_MAX_ANSWER} characters")
    if isinstance(space, spaces.Discrete):
        numbers = {name.casefold(): number for number, name in enumerate(names, start=int(space.start))}
        name = text.strip(_AROUND_A_NAME).casefold()
        if name in numbers:
            return np.int64(numbers[name])
        number = text if names else last_number(text)  # a number in a sentence about names may be about anything
        if not _WHOLE.fullmatch(number):
            raise ValueError(f"expected {form(space, names)}")
        return _decode(space, int(number), "it")
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ValueError(f"expected {words(space)}, as JSON") from None
    return _decode(space, value, "it")


def tell(space: Space, action: Any, names: Sequence[str]) -> str:
    """The action as a trace shows it."""
    if isinstance(space, spaces.Discrete) and names:
        return names[int(action) - int(space.start)]
    if isinstance(action, str):
        return printable(action, _MAX_READING) or "(empty)"
    return printable(json.dumps(_plain(action), ensure_ascii=False), _MAX_READING)


def _written(answer: str) -> str:
    """The last complete block in triple backticks, else the marked answer, else the whole answer."""
    block = fenced(answer)
    if block is not None:
        return block.strip().removeprefix("json\n").strip()
    found = marked(answer)
    return answer.strip() if found is None else found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)  # NaN and infinities are no JSON


@singledispatch
def _decode(space: Space, value: Any, at: str) -> Any:
    """Converts a JSON value to a sample. `at` is its place, for messages."""
    raise TypeError(f"check() lets no {type(space).__name__} pass")


@_decode.register
def _(space: spaces.Discrete, value: Any, at: str) -> Any:
    if type(value) is not int or not space.start <= value < space.start + space.n:
        raise ValueError(f"{at} must be {words(space)}")
    return np.int64(value)


@_decode.register
def _(space: spaces.Text, value: Any, at: str) -> Any:
    if not isinstance(value, str) or not space.contains(value):
        raise ValueError(f"{at} must be {words(space)}")
    return value


@_decode.register
def _(space: spaces.Dict, value: Any, at: str) -> Any:
    if not isinstance(value, dict) or set(value) != set(space):
        raise ValueError(f"{at} must be an object with {', '.join(map(json.dumps, space))}")
    return {key: _decode(part, value[key], json.dumps(key)) for key, part in space.items()}


@_decode.register(spaces.Tuple)
def _(space: Any, value: Any, at: str) -> Any:
    if not isinstance(value, list) or len(value) != len(space.spaces):
        raise ValueError(f"{at} must be a list of {len(space.spaces)}")
    pairs = enumerate(zip(space.spaces, value, strict=True), start=1)
    return tuple(_decode(part, one, f"element {number}") for number, (part, one) in pairs)


@_decode.register
def _(space: spaces.Sequence, value: Any, at: str) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"{at} must be a list")
    return tuple(_decode(space.feature_space, one, f"element {number}") for number, one in enumerate(value, start=1))


@_decode.register(spaces.OneOf)
def _(space: Any, value: Any, at: str) -> Any:
    is_pair = isinstance(value, list) and len(value) == 2 and type(value[0]) is int
    if not is_pair or not 0 <= value[0] < len(space.spaces):
        raise ValueError(f"{at} must be {words(space)}")
    return np.int64(value[0]), _decode(space.spaces[value[0]], value[1], "element 2")


@_decode.register(spaces.Box)
@_decode.register(spaces.MultiDiscrete)
@_decode.register(spaces.MultiBinary)
def _(space: Any, value: Any, at: str) -> Any:
    expected = f"{at} must be {words(space)}"
    whole = is_whole(space)
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError):
        raise ValueError(expected) from None
    if array.dtype.kind not in ("iu" if whole else "iuf"):
        raise ValueError(expected)
    if array.ndim == 0 and math.prod(space.shape) == 1:  # a bare number for a list of one
        array = array.reshape(space.shape)
    if array.shape != space.shape:
        raise ValueError(expected)
    if not whole:
        with np.errstate(over="ignore"):
            array = array.astype(space.dtype)  # before it is compared: 0.7 must not lie beyond the bound 0.7
    if isinstance(space, spaces.Box):
        inside = np.isfinite(array).all() and (space.low <= array).all() and (array <= space.high).all()
    else:
        inside = space.contains(array)
    if not inside:
        raise ValueError(expected)
    return array.astype(space.dtype)


def _plain(value: Any) -> Any:
    """A sample as JSON values; numbers with six digits."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return float(f"{value:.6g}") if isinstance(value, float) else value
