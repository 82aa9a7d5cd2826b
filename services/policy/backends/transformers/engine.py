"""The thread that owns the model: takes requests from the event loop and runs them together, pass by pass.

New requests join between two forward passes. Weights are changed in a pause. A pause begins when all work that was
submitted before it has finished; work that is submitted later waits until it ends. So each completion comes from one
version of the weights, and none is cut short.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import VersionSpan
from mulligan.policy.backend import Sampled
from mulligan.policy.backends.transformers.runner import Request, Runner

T = TypeVar("T")
_RETRY_AFTER = timedelta(milliseconds=200)


@dataclass(eq=False, slots=True)
class _Work:
    """One unit of work: a request, an iterator of steps, or, if it has neither, a pause.

    Steps are done one at a time between forward passes; urgent ones before what waits, even during a pause.
    """

    future: asyncio.Future[Any]  # of the answer, or of the beginning of the pause
    request: Request | None = None
    steps: Iterator[Any] | None = None
    urgent: bool = False
    priority: int = 0  # greater goes first
    parts: asyncio.Queue[Sampled | BaseException] | None = None  # where a stream's answer goes instead
    results: list[Any] = field(default_factory=list)  # of `steps`, so far
    over: bool = False  # nobody waits for it any longer; a pause ends

    def resolve(self, result: Any) -> None:
        if isinstance(result, DomainError):
            self.reject(result)
        elif self.parts is not None:
            self.parts.put_nowait(result)
        elif not self.future.done():
            self.future.set_result(result)

    def reject(self, error: BaseException) -> None:
        if self.parts is not None:
            self.parts.put_nowait(error)
        elif not self.future.done():
            self.future.set_exception(error)


class Engine:
    """Created on the event loop that will use it. All methods are called there; the rest runs in the thread.

    `prepare` is called first in the thread.
    """

    def __init__(
        self, runner: Runner, *, max_batch: int, max_queue: int, batch_wait: float, prepare: Callable[[], None]
    ):
        self._runner = runner
        self._max_batch = max_batch
        self._max_pending = max_batch + max_queue
        self._batch_wait = batch_wait
        self._prepare = prepare
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self.compute_seconds = 0.0  # in the model; changed by the thread alone
        self.pending = 0  # requests that run or wait; changed on the event loop
        self._closed = False  # changed on the event loop
        # From here on in the thread. Work waits in the order of the pauses before it, its priority and its arrival.
        self._waiting: list[tuple[int, float, int, _Work]] = []
        self._pauses = 0
        self._arrivals = itertools.count()
        self._urgent: deque[_Work] = deque()
        self._scoring: deque[_Work] = deque()
        self._active: dict[Request, _Work] = {}
        self._streaming: dict[Request, _Work] = {}  # those of `_active` whose answer is taken in parts
        self._pause: _Work | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="policy-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: Request, priority: int = 0) -> Sampled:
        """Raises DomainError QUEUE_FULL, ENGINE_UNAVAILABLE."""
        with self._admitted():
            work = _Work(self._loop.create_future(), request=request, priority=priority)
            result: Sampled = await self._do(work)
            return result

    async def stream(self, request: Request, priority: int = 0) -> AsyncGenerator[Sampled]:
        """As `generate`, in parts. Each part has the tokens sampled since the one before it was taken."""
        with self._admitted():
            parts: asyncio.Queue[Sampled | BaseException] = asyncio.Queue()
            work = _Work(self._loop.create_future(), request=request, priority=priority, parts=parts)
            self._submit(work)
            finished = False
            try:
                while not finished:
                    part = await parts.get()
                    while not parts.empty() and isinstance(part, Sampled):
                        part = _joined(part, parts.get_nowait())
                    finished = not isinstance(part, Sampled) or part.stop_reason is not None
                    if not isinstance(part, Sampled):
                        raise part
                    yield part
            finally:
                if not finished:
                    self._withdraw(work)

    async def in_steps(self, steps: Iterator[T]) -> list[T]:
        """Runs an iterator in the thread, with requests between its steps. Returns what it yielded. Raises as
        `generate`."""
        with self._admitted():
            result: list[T] = await self._do(_Work(self._loop.create_future(), steps=steps))
            return result

    async def urgently(self, steps: Iterator[T]) -> list[T]:
        """As `in_steps`, but ahead of all waiting work, also during a pause or when the queue is full. One at a
        time."""
        result: list[T] = await self._do(_Work(self._loop.create_future(), steps=steps, urgent=True))
        return result

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Begins when all work submitted before it has finished. Work submitted later waits until it ends."""
        work = _Work(self._loop.create_future())
        await self._do(work)
        try:
            yield
        finally:
            self._withdraw(work)

    async def close(self) -> None:
        """Fails all unfinished work, and all that is submitted later."""
        self._closed = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.pending >= self._max_pending:
            raise DomainError(
                Reason.QUEUE_FULL, f"{self.pending} requests run or wait already", retry_after=_RETRY_AFTER
            )
        self.pending += 1
        try:
            yield
        finally:
            self.pending -= 1

    async def _do(self, work: _Work) -> Any:
        self._submit(work)
        try:
            return await work.future
        except asyncio.CancelledError:
            self._withdraw(work)
            raise

    def _submit(self, work: _Work) -> None:
        if self._closed:
            raise _shut_down()
        self._inbox.put(work)

    def _withdraw(self, work: _Work) -> None:
        work.over = True
        self._inbox.put(work)

    def _run(self) -> None:
        self._prepare()
        while True:
            blocked = self._pause is not None or not self._waiting
            self._receive(wait=blocked and not (self._active or self._scoring or self._urgent))
            if self._closing:
                break
            try:
                self._advance()
            except Exception as error:  # noqa: BLE001 - a failed pass fails its requests, not the service
                self._fail(error)
        self._fail(_shut_down())

    def _receive(self, *, wait: bool) -> None:
        """Takes the work that has arrived. If idle, waits for the first piece, and then `batch_wait` for more."""
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
        elif work.over:
            self._drop(work)
        elif work.urgent:
            self._urgent.append(work)
        else:
            is_pause = work.request is None and work.steps is None
            order = math.inf if is_pause else -work.priority
            heapq.heappush(self._waiting, (self._pauses, order, next(self._arrivals), work))
            self._pauses += is_pause

    def _drop(self, work: _Work) -> None:
        if work is self._pause:
            self._pause = None
        elif work.request is not None and self._active.pop(work.request, None) is not None:
            self._streaming.pop(work.request, None)
            self._runner.cancel(work.request)

    def _advance(self) -> None:
        """Starts the work that may start, then does one forward pass and one step of each kind."""
        start = time.perf_counter()
        if self._urgent:
            self._step(self._urgent)
        self._start_waiting()
        if self._active:
            finished: list[tuple[_Work, Any]] = [
                (self._active.pop(request), end) for request, end in self._runner.step()
            ]
            if self._streaming:
                finished += self._take_parts(finished)
            self._deliver(finished)
        if self._scoring:
            self._step(self._scoring)
        self.compute_seconds += time.perf_counter() - start

    def _start_waiting(self) -> None:
        while self._waiting and self._pause is None:
            work = self._waiting[0][-1]
            if work.request is not None:
                is_full = len(self._active) >= self._max_batch or not self._runner.has_room(work.request)
                if is_full and not work.over:
                    return
            elif work.steps is None and (self._active or self._scoring) and not work.over:
                return
            heapq.heappop(self._waiting)
            if work.over:
                continue
            if work.request is not None:
                self._active[work.request] = work
                if work.parts is not None:
                    self._streaming[work.request] = work
                self._runner.admit(work.request)
            elif work.steps is not None:
                self._scoring.append(work)
            else:
                self._pause = work
                self._deliver([(work, None)])

    def _take_parts(self, finished: list[tuple[_Work, Any]]) -> list[tuple[_Work, Any]]:
        """The new parts of all running streams."""
        for work, _ in finished:
            assert work.request is not None
            self._streaming.pop(work.request, None)
        parts = [(work, self._runner.take_part(request)) for request, work in self._streaming.items()]
        return [(work, part) for work, part in parts if part is not None]

    def _step(self, works: deque[_Work]) -> None:
        """One step of the first work in the queue."""
        work = works[0]
        if work.over:
            works.popleft()
            return
        assert work.steps is not None
        try:
            results = list(itertools.islice(work.steps, 1))
        except Exception as error:  # noqa: BLE001 - it belongs to the caller
            works.popleft()
            self._deliver_error([work], error)
            return
        work.results.extend(results)
        if not results:
            works.popleft()
            self._deliver([(work, work.results)])

    def _fail(self, error: BaseException) -> None:
        waiting = [work for *_, work in self._waiting]
        works = [*self._active.values(), *self._scoring, *self._urgent, *waiting]
        for request in self._active:
            self._runner.cancel(request)
        for kept in (self._active, self._streaming, self._scoring, self._urgent, self._waiting):
            kept.clear()
        self._deliver_error(works, error)

    def _deliver(self, results: list[tuple[_Work, Any]]) -> None:
        """Delivers all results of one pass; wakes the event loop once."""
        if results:
            self._loop.call_soon_threadsafe(_resolve, results)

    def _deliver_error(self, works: list[_Work], error: BaseException) -> None:
        if works:
            self._loop.call_soon_threadsafe(_reject, works, error)


def _resolve(results: list[tuple[_Work, Any]]) -> None:
    for work, result in results:
        work.resolve(result)


def _reject(works: list[_Work], error: BaseException) -> None:
    for work in works:
        work.reject(error)


def _joined(first: Sampled, second: Sampled | BaseException) -> Sampled | BaseException:
    """Joins two parts of one stream. Both are of one version, since weights change only when nothing runs."""
    if not isinstance(second, Sampled):
        return second
    (before,), (after,) = first.policy_versions, second.policy_versions
    count = before.token_count + after.token_count
    return Sampled(
        first.token_ids + second.token_ids,
        first.log_probs + second.log_probs,
        second.stop_reason,
        (VersionSpan(after.policy_version, count),),
    )


def _shut_down() -> DomainError:
    return DomainError(Reason.ENGINE_UNAVAILABLE, "the model is being closed", retry_after=_RETRY_AFTER)
