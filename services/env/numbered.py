"""Tasks that are numbered within their split, such as `train/00012`."""

from __future__ import annotations

from collections.abc import Mapping

from mulligan.env.base import Split, UnknownTask

_DIGITS = 5
MAX_TASKS: int = 10**_DIGITS - 1  # of a split


def ids(split: Split, offset: int, limit: int, counts: Mapping[Split, int]) -> list[str]:
    """At most `limit` task ids of a split, from the one at `offset` on. `counts` says how many tasks a split has."""
    first = max(offset, 0)
    return [f"{split}/{number:0{_DIGITS}d}" for number in range(first, min(first + max(limit, 0), counts[split]))]


def read_id(task_id: str, counts: Mapping[Split, int], environment: str) -> tuple[Split, int]:
    """The split and the number of a task. Raises UnknownTask if the environment of this name has no such task."""
    split, _, digits = task_id.partition("/")
    well_formed = split in tuple(Split) and len(digits) == _DIGITS and digits.isascii() and digits.isdigit()
    if not well_formed or int(digits) >= counts[Split(split)]:
        raise UnknownTask(f"{task_id[:80]!r} is not a task of {environment}")
    return Split(split), int(digits)
