"""Checks of numbers that another service or an engine answers, where they come in.

Each raises ValueError that names the field and the number. The caller makes of that what its side raises at a bad
answer: `Connection.read` a CallFailed, the SGLang backend a BadAnswer. Rewards have rules of their own (`rewards.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

_ROUNDING = 1e-3  # how far above 0 the rounding of bfloat16 may take a log-probability


def finite(field: str, values: Iterable[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{field} {value}, not a finite number")


def not_negative(field: str, values: Iterable[int | float]) -> None:
    """Counts, ids, versions and seconds."""
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{field} {value}, not a number from 0")


def log_probs(field: str, values: Sequence[float | None], count: int | None = None) -> tuple[float, ...]:
    """The values, of tokens that were sampled or asked for, `count` where that many are expected: finite numbers that
    are at most 0, rounding aside."""
    if count is not None and len(values) != count:
        raise ValueError(f"{len(values)} {field} of {count} tokens")
    for value in values:
        if value is None or not math.isfinite(value) or value > _ROUNDING:
            raise ValueError(f"{field} {value}, not a finite number of at most 0")
    return tuple(value for value in values if value is not None)


def token_ids(field: str, values: Sequence[int], vocabulary_size: int = 0) -> None:
    """Of a vocabulary of this size; 0 where it is not known."""
    for value in values:
        if value < 0 or (vocabulary_size and value >= vocabulary_size):
            limit = f"to {vocabulary_size - 1}" if vocabulary_size else "on"
            raise ValueError(f"{field} {value}, not a token id from 0 {limit}")
