"""Threads for work that would hold up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class WorkThreads:
    """At most so many threads. Work waits for a free one in its caller's task: if the caller is cancelled meanwhile,
    the work is dropped at once with all that it holds. (A `ThreadPoolExecutor` keeps it until its turn comes.) Work
    that has begun runs to its end. Several event loops may use the threads."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._executor = ThreadPoolExecutor(most, thread_name_prefix=name)
        self._free: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`. Raises what it raises."""
        loop = asyncio.get_running_loop()
        free = self._free.setdefault(loop, asyncio.Semaphore(self._most))
        await free.acquire()
        running = self._executor.submit(work)

        def ended(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(free.release)

        running.add_done_callback(ended)
        return await asyncio.wrap_future(running)
