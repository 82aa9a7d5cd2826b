"""A thread that runs calls: all that wait at once, in one transaction."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa

R = TypeVar("R")
Call = Callable[[sa.Connection], Any]

_MAX_TRANSACTION = 256


class _Waiting(NamedTuple):
    call: Call
    future: asyncio.Future[Any]
    alone: bool


class Worker:
    """`run` answers several calls, with an exception where one failed; `end` is called last. Both run on the thread."""

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        run: Callable[[Sequence[Call], bool], list[Any]],
        end: Callable[[], None],
    ):
        self._loop = loop
        self._run = run
        self._end = end
        self._waiting: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def do(self, call: Callable[[sa.Connection], R], *, alone: bool = False) -> R:
        """The call's answer, after the commit. What is to run alone runs outside of a transaction."""
        future: asyncio.Future[R] = self._loop.create_future()
        self._waiting.put(_Waiting(call, future, alone))
        return await future

    async def close(self) -> None:
        """Runs what waits, and ends."""
        self._waiting.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        closing = False
        while not closing:
            taken = [self._waiting.get()]
            with suppress(Empty):
                while len(taken) < _MAX_TRANSACTION:
                    taken.append(self._waiting.get_nowait())
            closing = None in taken
            waiting = [one for one in taken if one is not None]
            self._answer([one for one in waiting if not one.alone], alone=False)
            for one in waiting:
                if one.alone:
                    self._answer([one], alone=True)
        self._end()

    def _answer(self, waiting: Sequence[_Waiting], *, alone: bool) -> None:
        if waiting:
            answers = self._run([one.call for one in waiting], alone)
            self._loop.call_soon_threadsafe(_deliver, [one.future for one in waiting], answers)


def _deliver(futures: Sequence[asyncio.Future[Any]], answers: Sequence[Any]) -> None:
    for future, answer in zip(futures, answers, strict=True):
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
