"""Requests of several callers, gathered so that they share a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Gathering(Generic[T]):
    """Gives what is put to `send`, all of one tick of the event loop together.

    While a call is `under_way`, what is put waits for more: for at most `seconds`, until there are `most`, or until no
    call is under way any more. So whoever is alone never waits.
    """

    def __init__(self, send: Callable[[list[T]], None], seconds: float, most: int):
        self._send = send
        self._seconds = seconds
        self._most = most
        self._waiting: list[T] = []
        self._calls = 0
        self._look_is_due = False
        self._timer: asyncio.TimerHandle | None = None

    def put(self, one: T) -> None:
        self._waiting.append(one)
        self._look_soon()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Around a call that what was gathered, or one of it, is sent with."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls and self._waiting:
                self._look_soon()

    def close(self) -> list[T]:
        """What waits is not sent any more, and returned."""
        self._stop_timer()
        waiting, self._waiting = self._waiting, []
        return waiting

    def _look_soon(self) -> None:
        if not self._look_is_due:
            self._look_is_due = True
            asyncio.get_running_loop().call_soon(self._look)  # at the end of this tick

    def _look(self) -> None:
        self._look_is_due = False
        if not self._calls or len(self._waiting) >= self._most:
            self._flush()
        elif self._timer is None and self._waiting:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._flush)

    def _flush(self) -> None:
        self._stop_timer()
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._send(waiting)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def cancel_without_callers(task: asyncio.Task[None], futures: Sequence[asyncio.Future[Any]]) -> None:
    """Cancels a shared call when nobody waits for it any more: each caller has an answer or was cancelled."""
    left = len(futures)

    def one_less(_: asyncio.Future[Any]) -> None:
        nonlocal left
        left -= 1
        if not left and any(future.cancelled() for future in futures):
            task.cancel()

    for future in futures:
        future.add_done_callback(one_less)
