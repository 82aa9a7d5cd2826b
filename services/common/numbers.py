"""Checks of numbers from another service or an engine.

Each raises ValueError, which names the field and the number. Callers turn that into their own error for a bad answer:
`Connection.read` into CallFailed, the SGLang backend into BadAnswer. `rewards.py` checks rewards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

_ROUNDING = 1e-3  # how far above 0 a log-probability may be through rounding in bfloat16


def finite(field: str, values: Iterable[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{field} {value}, not a finite number")


def not_negative(field: str, values: Iterable[int | float]) -> None:
    """For counts, ids, versions and seconds."""
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{field} {value}, not a number from 0")


def log_probs(field: str, values: Sequence[float | None], count: int | None = None) -> tuple[float, ...]:
    """Returns log-probabilities of tokens if each is finite and at most 0, rounding aside. `count` is the expected
    number of values, if any is expected."""
    if count is not None and len(values) != count:
        raise ValueError(f"{len(values)} {field} of {count} tokens")
    for value in values:
        if value is None or not math.isfinite(value) or value > _ROUNDING:
            raise ValueError(f"{field} {value}, not a finite number of at most 0")
    return tuple(value for value in values if value is not None)


def token_ids(field: str, values: Sequence[int], vocabulary_size: int = 0) -> None:
    """Checks against `vocabulary_size`; 0 means unknown."""
    for value in values:
        if value < 0 or (vocabulary_size and value >= vocabulary_size):
            limit = f"to {vocabulary_size - 1}" if vocabulary_size else "on"
            raise ValueError(f"{field} {value}, not a token id from 0 {limit}")
