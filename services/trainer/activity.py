"""What a run does now, for those who wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mulligan.trainer.data import Datum, token_count
from mulligan.trainer.interfaces import LearnerPort

Count = Callable[[], tuple[int, int]]  # the parts that are done, and how many there are
Begin = Callable[[str, Count], None]
_TOLD_SECONDS = 2.0  # what took less the last time has no parts


@dataclass(frozen=True, slots=True)
class Activity:
    """`done` of `total` parts are done; both are 0 if there are no parts. `seconds` is the time since it began."""

    doing: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0


def no_parts() -> tuple[int, int]:
    return 0, 0


def untold(doing: str, count: Count) -> None:
    """A `Begin` for whoever does not tell what is done."""


class CurrentActivity:
    """Of one run. It is counted when it is asked for. What has no parts is measured by the seconds that it took the
    last time, if it took some."""

    def __init__(self) -> None:
        self._lasted: dict[str, float] = {}
        self._doing = ""
        self._count: Count = no_parts
        self._began = time.monotonic()

    def begin(self, doing: str, count: Count = no_parts) -> None:
        """From now on the run does this."""
        now = time.monotonic()
        if self._doing and self._count is no_parts:
            self._lasted[self._doing] = now - self._began
        self._doing = doing
        self._count = count
        self._began = now

    def now(self) -> Activity:
        seconds = time.monotonic() - self._began
        last = self._lasted.get(self._doing, 0.0)
        if self._count is no_parts and last >= _TOLD_SECONDS:
            return Activity(f"{self._doing}, seconds", int(seconds), round(max(seconds, last)), seconds)
        done, total = self._count()
        return Activity(self._doing, done, max(done, total), seconds)


@dataclass
class CallsOfLearner:
    """Counts the tokens of several calls of a learner. `total` is that of all."""

    learner: LearnerPort
    total: int
    _done: int = field(init=False, default=0)
    _now: int = field(init=False, default=0)

    def count(self) -> tuple[int, int]:
        return self._done + int(self._now * self.learner.share_done), self.total

    @contextmanager
    def call(self, data: Sequence[Datum]) -> Iterator[None]:
        """Around a call with these data."""
        self._now = token_count(data)
        yield
        self._done += self._now
        self._now = 0
