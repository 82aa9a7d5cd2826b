"""Helpers for asyncio tasks: gather, cancel, wake, limit, and run in another thread."""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")
_END_SECONDS = 5.0
_MADE_AT_A_TIME = 100  # tasks, before others of the event loop have their turn


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. After the first failure the others are cancelled and waited for, and that failure is
    raised as it is. A caller that is cancelled gets CancelledError, whatever the others raise."""
    caller = asyncio.current_task()
    assert caller is not None
    cancelled_before = caller.cancelling()
    source = iter(coroutines)
    tasks: list[asyncio.Future[T]] = []
    try:
        for coroutine in source:
            tasks.append(asyncio.ensure_future(coroutine))
            if len(tasks) % _MADE_AT_A_TIME == 0:
                await asyncio.sleep(0)
        return await asyncio.gather(*tasks)
    except Exception:
        if caller.cancelling() > cancelled_before:
            raise asyncio.CancelledError from None
        raise
    finally:
        for unused in source:
            unused.close()
        await cancel(*tasks)


async def gather_in_turn(coroutines: Iterable[Coroutine[Any, Any, T]], at_once: int) -> list[T]:
    """As `gather_or_cancel`, with at most `at_once` of them at a time, which begin in order. `coroutines` makes each
    one only when it can begin: what waits takes no memory."""
    results: dict[int, T] = {}
    source = enumerate(coroutines)
    all_begun = False

    async def work() -> None:
        nonlocal all_begun
        for place, coroutine in source:
            results[place] = await coroutine
        all_begun = True

    def workers() -> Iterator[Coroutine[Any, Any, None]]:
        for _ in range(at_once):
            if all_begun:
                return
            yield work()

    await gather_or_cancel(workers())
    return [results[place] for place in range(len(results))]


async def cancel(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancels what still runs and waits until all have ended. Their results and errors are dropped; None is ignored."""
    present = [task for task in tasks if task is not None]
    for task in present:
        task.cancel()
    await asyncio.gather(*present, return_exceptions=True)


def is_asked_to_end() -> bool:
    """Whether somebody cancelled the present task. Otherwise a CancelledError is a failure of what it awaited: of a
    subtask that was cancelled, or of a library. Nobody waits for the task to end then."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs
        return False
    return task is not None and task.cancelling() > 0


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which ends also if the caller is cancelled meanwhile. CancelledError is raised after that,
    and what `work` raised then is dropped."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


class Broadcast:
    """Wakes every task that waits at that moment. Those that wait later sleep until the next time.

    An `asyncio.Event` has to be cleared for that, and an `asyncio.Condition` needs a lock.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()

    def wake_all(self) -> None:
        self._event.set()
        self._event = asyncio.Event()


class PrioritySlots:
    """At most `slots` holders at a time, as a semaphore. A slot that becomes free goes to the waiter with the least
    `priority`; among equals, to the one that came first."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._numbers = count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def held(self, priority: int = 0) -> AsyncIterator[None]:
        await self.acquire(priority)
        try:
            yield
        finally:
            self.release()

    async def acquire(self, priority: int = 0) -> None:
        if self._free:  # nobody waits
            self._free -= 1
            return
        given = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._numbers), given))
        try:
            await given
        except asyncio.CancelledError:
            if not given.cancelled():  # it was given and cannot be used
                self.release()
            raise

    def release(self) -> None:
        while self._waiting:
            given = heapq.heappop(self._waiting)[-1]
            if not given.done():
                given.set_result(None)
                return
        self._free += 1


class LoopThread:
    """An event loop in its own thread, for callers that block. Its tasks go on while the caller does something else."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """Runs the coroutine and returns its result. Raises TimeoutError after `seconds`.

        The coroutine is cancelled then, and also when the caller is interrupted.
        """
        future = self.later(coroutine)
        try:
            return future.result(seconds)
        except BaseException:
            future.cancel()
            raise

    def later(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts the coroutine and does not wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_END_SECONDS)


class TooLong(TimeoutError):
    """A wait outlasted the `TimeLimit` that it was under."""


class TimeLimit:
    """A limit in seconds for many waits at once, most of which are short: one timer, where `asyncio.timeout` would have
    one for each. A task is under it once at a time. A wait may last up to a tenth longer."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._begun: dict[asyncio.Task[Any], float] = {}  # the oldest first
        self._expired: set[asyncio.Task[Any]] = set()
        self._is_armed = False

    async def within(self, wait: Awaitable[T]) -> T:
        """Raises TooLong."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        self._begun[task] = loop.time()
        if not self._is_armed:
            self._arm(loop, self.seconds)
        cancelling = task.cancelling()
        try:
            return await wait
        except asyncio.CancelledError:
            if task in self._expired and task.uncancel() <= cancelling:
                raise TooLong(f"longer than {self.seconds:g} s") from None
            raise
        finally:
            self._begun.pop(task, None)
            self._expired.discard(task)

    def _arm(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._is_armed = True
        loop.call_later(seconds, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_armed = False
        now = loop.time()
        while self._begun:
            task, since = next(iter(self._begun.items()))
            left = since + self.seconds - now
            if left > 0:
                self._arm(loop, max(left, self.seconds / 10))
                return
            del self._begun[task]
            self._expired.add(task)
            task.cancel()
