"""Writes the metrics of a run with the writers of `tracking.writers`, beside training."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from urllib.parse import quote
from weakref import WeakValueDictionary

import msgspec

from mulligan.common.files import make_folder
from mulligan.common.state_files import read_document, write_document
from mulligan.common.tasks import cancel
from mulligan.trainer.events import Entry, EvaluationEvent, EventLog, StepEvent
from mulligan.trainer.foreign import FAILURES
from mulligan.trainer.metric_writers import METRIC_WRITERS, MetricWriter, TrackedRun
from mulligan.trainer.settings import TrackingSettings

CLOSE_SECONDS = 10.0  # how long a run waits for its writers at its end
_ADVICE = "It says which events a metric writer has: remove the file, and the writer gets all events again."
_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"://[^/@\s]+@")
_ERROR_CHARACTERS = 300
_FOLDERS: WeakValueDictionary[Path, threading.Lock] = WeakValueDictionary()  # held by the threads that write there
_FOLDERS_LOCK = threading.Lock()


class TrackingPosition(msgspec.Struct, frozen=True):
    """The number of the last event that a writer has."""

    event: int


class Tracking:
    """While the block runs, each writer gets the events that it has not had yet, in a thread of its own. A writer that
    fails is told of by `notice`, and tried again with the next event: nothing waits for it. Leaving the block waits for
    `CLOSE_SECONDS` at most; what is not written by then is written when the run is resumed."""

    def __init__(
        self,
        run_id: str,
        folder: Path,
        tracking: TrackingSettings,
        settings: Mapping[str, object],
        events: EventLog,
        notice: Callable[[str], None],
    ):
        self._events = events
        self._notice = notice
        self._workers = [
            TrackingThread(name, TrackedRun(run_id, tracking.project, folder / "tracking" / quote(name, ""), settings))
            for name in tracking.writers
        ]
        self._handed = 0  # the number of the last event
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Tracking:
        loop = asyncio.get_running_loop()
        for worker in self._workers:
            worker.start(loop, self._notice)
        if self._workers:
            self._task = asyncio.create_task(self._follow(), name="tracking")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await cancel(self._task)
        for entry in self._events.entries:
            self._hand(entry)
        for worker in self._workers:
            worker.finish()
        if self._workers:
            waiting = [asyncio.ensure_future(worker.done.wait()) for worker in self._workers]
            try:
                await asyncio.wait(waiting, timeout=CLOSE_SECONDS)
            finally:
                await cancel(*waiting)
                for worker in self._workers:
                    worker.abandon()

    async def _follow(self) -> None:
        async for entry in self._events.follow(0):
            self._hand(entry)

    def _hand(self, entry: Entry) -> None:
        if entry.number > self._handed:
            self._handed = entry.number
            for worker in self._workers:
                worker.hand(entry)


def _lock_of(folder: Path) -> threading.Lock:
    """One thread at a time writes for a run, also where the run was resumed before an earlier thread had ended."""
    with _FOLDERS_LOCK:
        return _FOLDERS.setdefault(folder, threading.Lock())


class TrackingThread:
    """One writer and its thread. `done` is set when it has closed the writer."""

    def __init__(self, name: str, run: TrackedRun):
        self._name = name
        self._run = run
        self._position_file = run.folder.with_name(f"{run.folder.name}.json")
        self._entries: SimpleQueue[Entry | None] = SimpleQueue()
        self._pending: deque[Entry] = deque()
        self._writer: MetricWriter | None = None
        self._written = 0
        self._abandoned = False
        self._failed = False
        self.done = asyncio.Event()

    def start(self, loop: asyncio.AbstractEventLoop, notice: Callable[[str], None]) -> None:
        self._loop = loop
        self._notice = notice
        # A daemon: one that waits for a network does not keep the trainer from ending.
        threading.Thread(target=self._work, name=f"metric writer {self._name}", daemon=True).start()

    def hand(self, entry: Entry) -> None:
        if isinstance(entry.event, StepEvent | EvaluationEvent):
            self._entries.put(entry)

    def finish(self) -> None:
        self._entries.put(None)

    def abandon(self) -> None:
        """Ends the thread after the write that it is in. Nobody waits for it any more."""
        self._abandoned = True

    def _work(self) -> None:
        try:
            with _lock_of(self._run.folder):
                while not self._abandoned and (entry := self._entries.get()) is not None:
                    self._pending.append(entry)
                    self._try(self._catch_up)
                if self._writer is not None:
                    self._try(self._writer.close)
        finally:
            self._in_loop(self.done.set)

    def _catch_up(self) -> None:
        """Gives the writer what it has not had."""
        if self._writer is None:
            if self._position_file.exists():
                self._written = read_document(self._position_file, TrackingPosition, _ADVICE).event
            make_folder(self._position_file.parent)
            self._writer = METRIC_WRITERS.find(self._name).open(self._run)
        while self._pending and not self._abandoned:
            entry = self._pending[0]
            if entry.number > self._written:
                step, metrics = metrics_of(entry.event)
                self._writer.write(step, metrics, entry.time)
                self._written = entry.number
                write_document(self._position_file, TrackingPosition(entry.number))
            self._pending.popleft()

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except FAILURES as error:  # of foreign code; the run goes on
            if not self._failed:
                self._failed = True
                text = f"metrics do not reach {self._name}: {without_secrets(error)}. The run goes on, and tries again"
                self._in_loop(lambda: self._notice(text))

    def _in_loop(self, action: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(action)


def metrics_of(event: object) -> tuple[int, dict[str, float]]:
    """The step and the metrics of an event. A step's have the names that `events.jsonl` has. An evaluation's have
    `evaluation/` before them, for some are called as a step's; in a further environment, `evaluation/NAME/`."""
    if isinstance(event, StepEvent):
        return event.step, event.metrics
    assert isinstance(event, EvaluationEvent)
    own = {name: float(getattr(event, name)) for name in ("success", "mean_reward", "attempts", "excluded")}
    prefix = f"evaluation/{event.environment}/" if event.environment else "evaluation/"
    return event.step, {f"{prefix}{name}": value for name, value in (own | event.metrics).items()}


def without_secrets(error: BaseException) -> str:
    """What an error says, without credentials of the environment's variables and of addresses."""
    text = f"{type(error).__name__}: {error}"
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 3:
            text = text.replace(value, "***")
    text = _IN_ADDRESS.sub("://***@", text)
    return text if len(text) <= _ERROR_CHARACTERS else f"{text[:_ERROR_CHARACTERS]}…"
