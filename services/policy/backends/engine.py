"""The thread that owns the model: takes requests from the event loop and runs them together, pass by pass.

New requests join between two forward passes. An update of the weights waits until what runs has finished, while
requests that come later wait for the update: so each completion has one version, and nothing is cut short.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from services.common.errors import DomainError, Reason
from services.policy.backend import Sampled
from services.policy.backends.runner import Request, Runner

T = TypeVar("T")
_RETRY_AFTER = timedelta(milliseconds=200)


@dataclass(eq=False, slots=True)
class _Work:
    """One thing to do, and the future that waits for it. One of request, steps and exclusive is set.

    `steps` is done a step at a time between forward passes, `exclusive` alone, when nothing runs.
    """

    future: asyncio.Future[Any]
    request: Request | None = None
    steps: Iterator[Any] | None = None
    exclusive: Callable[[], Any] | None = None
    results: list[Any] = field(default_factory=list)  # of `steps`, so far
    cancelled: bool = False


class Engine:
    """Created on the event loop that will use it. All methods are called there; the rest runs in the thread."""

    def __init__(self, runner: Runner, *, max_batch: int, max_queue: int, batch_wait: float):
        self._runner, self._max_batch, self._max_pending = runner, max_batch, max_batch + max_queue
        self._batch_wait = batch_wait
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self.compute_seconds = 0.0  # in the model; changed by the thread alone
        self.pending = 0  # requests that run or wait; changed on the event loop
        self._waiting: deque[_Work] = deque()  # from here on in the thread
        self._scoring: deque[_Work] = deque()
        self._active: dict[Request, _Work] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="policy-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> Sampled:
        """Raises DomainError QUEUE_FULL."""
        self._admit()
        result: Sampled = await self._do(_Work(self._loop.create_future(), request=request))
        return result

    async def in_steps(self, steps: Iterator[T]) -> list[T]:
        """Runs an iterator in the thread, other requests in between; returns what it yielded. Raises QUEUE_FULL."""
        self._admit()
        result: list[T] = await self._do(_Work(self._loop.create_future(), steps=steps))
        return result

    async def exclusively(self, action: Callable[[], T]) -> T:
        """Runs this in the thread once all that was submitted before has finished, before anything submitted later."""
        self.pending += 1
        result: T = await self._do(_Work(self._loop.create_future(), exclusive=action))
        return result

    async def close(self) -> None:
        """Fails whatever has not finished."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _admit(self) -> None:
        if self.pending >= self._max_pending:
            raise DomainError(
                Reason.QUEUE_FULL, f"{self.pending} requests run or wait already", retry_after=_RETRY_AFTER
            )
        self.pending += 1

    async def _do(self, work: _Work) -> Any:
        self._inbox.put(work)
        try:
            return await work.future
        except asyncio.CancelledError:
            work.cancelled = True
            self._inbox.put(work)
            raise
        finally:
            self.pending -= 1

    def _run(self) -> None:
        while not self._closing:
            idle = not (self._active or self._waiting or self._scoring)
            self._receive(wait=idle)
            try:
                self._advance()
            except Exception as error:  # noqa: BLE001 - a failed pass fails its requests, not the service
                self._fail(error)
        self._fail(RuntimeError("the policy is shutting down"))

    def _receive(self, *, wait: bool) -> None:
        """Takes what has arrived. When idle it waits for the first, and a moment for those that come with it."""
        if wait:
            self._file(self._inbox.get())
            deadline = time.monotonic() + self._batch_wait
            while (left := deadline - time.monotonic()) > 0:
                try:
                    self._file(self._inbox.get(timeout=left))
                except queue.Empty:
                    break
        try:
            while True:
                self._file(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _file(self, work: _Work | None) -> None:
        if work is None:
            self._closing = True
        elif not work.cancelled:
            self._waiting.append(work)
        elif work.request is not None and self._active.pop(work.request, None) is not None:
            self._runner.cancel(work.request)

    def _advance(self) -> None:
        """Starts what may start, then does one forward pass and one step of scoring."""
        while self._waiting and not self._closing:
            work = self._waiting[0]
            if work.exclusive is not None and not work.cancelled:
                if self._active or self._scoring:
                    break
                self._waiting.popleft()
                self._perform(work)
                continue
            if work.request is not None and len(self._active) >= self._max_batch:
                break
            self._waiting.popleft()
            if work.cancelled:
                continue
            if work.request is not None:
                self._active[work.request] = work
                self._runner.admit(work.request)
            else:
                self._scoring.append(work)
        start = time.perf_counter()
        if self._active:
            finished = self._runner.step()
            self._deliver([(self._active.pop(request), sampled) for request, sampled in finished])
        if self._scoring:
            self._score_step()
        self.compute_seconds += time.perf_counter() - start

    def _perform(self, work: _Work) -> None:
        assert work.exclusive is not None
        try:
            self._deliver([(work, work.exclusive())])
        except Exception as error:  # noqa: BLE001 - it belongs to the caller
            self._deliver_error([work], error)

    def _score_step(self) -> None:
        work = self._scoring[0]
        if work.cancelled:
            self._scoring.popleft()
            return
        assert work.steps is not None
        try:
            results = list(itertools.islice(work.steps, 1))
        except Exception as error:  # noqa: BLE001 - it belongs to the caller
            self._scoring.popleft()
            self._deliver_error([work], error)
            return
        work.results.extend(results)
        if not results:
            self._scoring.popleft()
            self._deliver([(work, work.results)])

    def _fail(self, error: BaseException) -> None:
        works = [*self._active.values(), *self._scoring, *self._waiting]
        for request in self._active:
            self._runner.cancel(request)
        self._active.clear()
        self._scoring.clear()
        self._waiting.clear()
        self._deliver_error(works, error)

    def _deliver(self, results: list[tuple[_Work, Any]]) -> None:
        """Wakes the event loop once for all that one pass finished."""
        if results:
            self._loop.call_soon_threadsafe(_resolve, results)

    def _deliver_error(self, works: list[_Work], error: BaseException) -> None:
        if works:
            self._loop.call_soon_threadsafe(_reject, works, error)


def _resolve(results: list[tuple[_Work, Any]]) -> None:
    for work, result in results:
        if not work.future.done():
            work.future.set_result(result)


def _reject(works: list[_Work], error: BaseException) -> None:
    for work in works:
        if not work.future.done():
            work.future.set_exception(error)
