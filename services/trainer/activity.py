"""What a run does now, for those who wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Activity:
    """`done` of `total` parts are done; both are 0 if there are no parts. `seconds` is the time since it began."""

    doing: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0


class CurrentActivity:
    """Of one run. It is counted when it is asked for."""

    def __init__(self) -> None:
        self.begin("")

    def begin(self, doing: str, count: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> None:
        """From now on the run does this. `count` gives the parts that are done, and how many there are."""
        self._doing = doing
        self._count = count
        self._began = time.monotonic()

    def now(self) -> Activity:
        done, total = self._count()
        return Activity(self._doing, done, max(done, total), time.monotonic() - self._began)
