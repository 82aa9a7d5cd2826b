"""A line that shows how many bytes of something are there."""

from __future__ import annotations

import time

from mulligan.cli.progress import LiveLine, time_left


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


class ByteLine(LiveLine):
    """Shows what is done now, and how much of it is there."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._began = time.monotonic()
        self._doing = ""
        self._there = 0  # bytes that were there when it began

    def update(self, doing: str, done: int, total: int) -> None:
        """`done` of `total` bytes are there; `total` is 0 if that is not known."""
        if doing != self._doing or done < self._there:
            self._doing = doing
            self._began = time.monotonic()
            self._there = done
        left = time_left(time.monotonic() - self._began, done - self._there, total - self._there)
        amount = f": {megabytes(done)} of {megabytes(total)}  left {left}"
        self.say(f"{doing}{amount if total else ''}")
