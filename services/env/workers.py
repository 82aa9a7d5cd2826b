"""Worker threads for blocking environment code: one thread switch per batch, and one lost thread per hanging call.

The event loop hands over a batch as one queue entry. It wakes one worker, which works through all of the batch: the
switch (tens of microseconds) is paid once per batch, so fast environments run almost as fast as plain Python. If a
batch is unfinished after a few milliseconds, its calls are slow, and more workers help.

After handing over a batch, the loop waits for it up to `_PATIENCE_SECONDS`. The calls of most games take microseconds
and are done by then, which saves three turns of the loop. While calls take longer, the loop waits only for one batch in
`_PATIENT_ONE_IN`.

A call that exceeds the limit is given up: its caller gets TimedOut, and its thread is abandoned and replaced. Python
cannot end a thread, so an abandoned one lives until its call returns. At most `max_abandoned` lost threads are
replaced. Once no thread is left, every call fails at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

_HELP_AFTER_SECONDS = 0.003
_TELL_AFTER_SECONDS = 0.001  # results are reported at the end of a batch, or after this time
_PATIENCE_SECONDS = 0.0005
_PATIENT_ONE_IN = 64  # while calls are slow, the loop waits for one batch in this many
R = TypeVar("R")


class TimedOut(Exception):
    """The call exceeded its time limit, or no thread is left to run it."""


class Job(ABC):
    """One blocking call."""

    __slots__ = ("settled",)

    def __init__(self) -> None:
        self.settled = False

    @abstractmethod
    def call(self) -> object:
        """Runs on a worker thread."""

    @abstractmethod
    def done(self, result: object) -> None:
        """Called exactly once, on the event loop, with the result or the exception."""

    def settle(self, result: object) -> None:
        if not self.settled:
            self.settled = True
            self.done(result)


class FunctionJob(Job):
    """A job made of two functions."""

    __slots__ = ("_call", "_done")

    def __init__(self, call: Callable[[], object], done: Callable[[object], None]):
        super().__init__()
        self._call = call
        self._done = done

    def call(self) -> object:
        return self._call()

    def done(self, result: object) -> None:
        self._done(result)


class _Batch:
    __slots__ = ("finished", "helpers", "is_awaited", "jobs", "waiting")

    def __init__(self, jobs: Sequence[Job]):
        self.jobs = jobs
        self.waiting = deque(jobs)
        self.helpers = 1
        self.is_awaited = False  # the loop waits for `finished`, so the worker need not notify it
        self.finished = threading.Lock()

    def is_settled(self) -> bool:
        return all(job.settled for job in self.jobs)


class _Place:
    """The waiting place of one worker."""

    __slots__ = ("filled", "item")

    def __init__(self) -> None:
        self.item: _Batch | None = None
        self.filled = threading.Lock()
        self.filled.acquire()


class _Queue:
    """Hands a batch to the worker that became idle last, and wakes no other; its stack is still in the cache.
    `queue.SimpleQueue` wakes workers in turn, sometimes two: a single step took 10% longer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: deque[_Batch | None] = deque()
        self._places: list[_Place] = []

    def put(self, item: _Batch | None) -> None:
        with self._lock:
            if not self._places:
                self._items.append(item)
                return
            place = self._places.pop()
        place.item = item
        place.filled.release()

    def get(self, place: _Place) -> _Batch | None:
        """Waits for a batch."""
        with self._lock:
            if self._items:
                return self._items.popleft()
            self._places.append(place)
        place.filled.acquire()
        item = place.item
        place.item = None
        return item

    def empty(self) -> bool:
        return not self._items


class _Worker:
    """A thread that runs batches until it is told to stop. One that was abandoned ends when its call returns."""

    def __init__(self, pool: WorkerPool):
        self.current: tuple[Job, float] | None = None  # with its start time; one tuple, as the loop reads it
        self.abandoned = False
        self._pool = pool
        threading.Thread(target=self._run, name="environment", daemon=True).start()

    def _run(self) -> None:
        place = _Place()
        while not self.abandoned and (batch := self._pool.queue.get(place)) is not None:
            self._work(batch)
            if batch.is_awaited:
                batch.finished.release()
            else:
                self._tell(self._pool.collect)
        self._tell(lambda: self._pool.gone(self))

    def _work(self, batch: _Batch) -> None:
        told = time.monotonic()
        while not self.abandoned:
            try:
                job = batch.waiting.popleft()
            except IndexError:
                return
            began = time.monotonic()
            if began - told > _TELL_AFTER_SECONDS and not batch.is_awaited:
                self._tell(self._pool.collect)
                told = began
            self.current = (job, began)
            try:
                result = job.call()
            except BaseException as error:  # noqa: BLE001 - foreign code may raise anything, SystemExit included
                result = error
            self.current = None
            self._pool.results.append((job, result))

    def _tell(self, callback: Callable[[], None]) -> None:
        try:
            self._pool.loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: the process is ending
            self.abandoned = True


class WorkerPool:
    """The threads of a server, used from one event loop.

    `submit` queues a batch. A worker runs its jobs, appends the results, and wakes the loop, which calls `Job.done` for
    each in `collect`. While batches are open, `_look` runs every few milliseconds: it sends more workers to slow
    batches and gives up calls that exceed `limit_seconds`, counted from when a call begins to run.
    """

    def __init__(self, size: int, limit_seconds: float, max_abandoned: int):
        self.queue = _Queue()
        self.results: deque[tuple[Job, object]] = deque()
        self.loop = asyncio.get_running_loop()
        self._size = size
        self._limit_seconds = limit_seconds
        self._max_abandoned = max_abandoned
        self._open: list[_Batch] = []
        self._look_timer: asyncio.TimerHandle | None = None
        self._next_watch = 0.0
        self._closed = False
        self._impatient = 0  # batches left that the loop does not wait for
        self._workers = {_Worker(self) for _ in range(size)}

    @property
    def exhausted(self) -> bool:
        """Whether every thread hangs and none may be added."""
        return all(worker.abandoned for worker in self._workers)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues a batch. Jobs that finish quickly are done when this returns."""
        batch = _Batch(jobs)
        if self._impatient:
            self._impatient -= 1
            self.queue.put(batch)
        elif self._finishes_soon(batch):
            return
        self._open.append(batch)
        if self._look_timer is None:
            self._look_timer = self.loop.call_later(_HELP_AFTER_SECONDS, self._look)

    def _finishes_soon(self, batch: _Batch) -> bool:
        batch.is_awaited = True
        batch.finished.acquire()
        self.queue.put(batch)
        finished = batch.finished.acquire(timeout=_PATIENCE_SECONDS)
        batch.is_awaited = False  # a worker that still saw True has already left its results
        self.collect()
        if not finished:
            self._impatient = _PATIENT_ONE_IN
        return finished

    async def run(self, call: Callable[[], R]) -> R:
        """Runs one call. Returns its result; raises its exception, or TimedOut."""
        future: asyncio.Future[R] = self.loop.create_future()

        def done(result: object) -> None:
            if future.cancelled():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            elif isinstance(result, BaseException):
                future.set_exception(RuntimeError(f"{type(result).__name__}: {result}"))
            else:
                future.set_result(result)  # type: ignore[arg-type]  # what `call` returned

        self.submit([FunctionJob(call, done)])
        return await future

    def close(self) -> None:
        """Ends idle threads. Hanging ones are daemons and end with the process."""
        self._closed = True
        if self._look_timer is not None:
            self._look_timer.cancel()
        for _ in self._workers:
            self.queue.put(None)

    def collect(self) -> None:
        while self.results:
            job, result = self.results.popleft()
            job.settle(result)

    def gone(self, worker: _Worker) -> None:
        """A thread ended. If it was abandoned, another may now be replaced."""
        self._workers.discard(worker)
        self._replace()

    def _look(self) -> None:
        """Runs every few milliseconds while batches are open: helps slow batches and gives up hanging calls."""
        self.collect()
        now = time.monotonic()
        if now >= self._next_watch:
            self._next_watch = now + min(self._limit_seconds / 4, 0.25)
            self._give_up(now)
        self._open = [batch for batch in self._open if not batch.is_settled()]
        for batch in self._open:
            if batch.waiting and self.queue.empty():
                for _ in range(min(batch.helpers, len(batch.waiting))):
                    self.queue.put(batch)
                batch.helpers = min(batch.helpers * 2, self._size)
        self._look_timer = self.loop.call_later(_HELP_AFTER_SECONDS, self._look) if self._open else None

    def _give_up(self, now: float) -> None:
        for worker in tuple(self._workers):
            current = worker.current
            if current is not None and not current[0].settled and now - current[1] > self._limit_seconds:
                worker.abandoned = True
                current[0].settle(TimedOut(f"not finished within {self._limit_seconds:g} s"))
                self._replace()
        if self.exhausted:
            for batch in self._open:
                for job in batch.waiting:
                    job.settle(TimedOut(f"all {len(self._workers)} threads hang: restart the server"))
                batch.waiting.clear()

    def _replace(self) -> None:
        abandoned = sum(worker.abandoned for worker in self._workers)
        if not self._closed and abandoned <= self._max_abandoned and len(self._workers) - abandoned < self._size:
            self._workers.add(_Worker(self))
