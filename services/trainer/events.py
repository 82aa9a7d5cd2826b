"""The events of a run: numbered from 1, kept in `events.jsonl`, and followed live by any number of watchers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from mulligan.common.disk import writing_to
from mulligan.common.errors import DomainError
from mulligan.common.files import append
from mulligan.common.tasks import Broadcast


class StepEvent(msgspec.Struct, frozen=True, tag="step"):
    step: int
    metrics: dict[str, float]


class EvaluationEvent(msgspec.Struct, frozen=True, tag="evaluation"):
    step: int  # steps trained before it
    success: float
    mean_reward: float
    attempts: int
    excluded: int
    metrics: dict[str, float] = {}  # of the protocols, by LABEL/METRIC
    environment: str = ""  # empty: the run's own


class StateEvent(msgspec.Struct, frozen=True, tag="state"):
    state: str
    error: str = ""


class NoticeEvent(msgspec.Struct, frozen=True, tag="notice"):
    text: str


Event = StepEvent | EvaluationEvent | StateEvent | NoticeEvent


class Entry(msgspec.Struct, frozen=True):
    number: int
    time: datetime
    event: Event


_DECODER = msgspec.json.Decoder(Entry)


class EventLog:
    """`add` appends an event, wakes the watchers and writes the file. If writing fails, the watchers still see the
    event, and the next write includes it. Opening the file cuts off a torn last line."""

    def __init__(self, path: Path):
        self.entries: list[Entry] = []
        self._path = path
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            self.entries.extend(map(_DECODER.decode, whole))
            if len(whole) < len(lines):
                os.truncate(path, sum(map(len, whole)))
        self._written = len(self.entries)
        self._changed = Broadcast()

    def add(self, event: Event) -> None:
        """Raises the errors of `write`, after the watchers were told."""
        self.entries.append(Entry(len(self.entries) + 1, datetime.now(UTC), event))
        self._changed.wake_all()
        self.write()

    def tell(self, event: Event) -> None:
        """As `add`, but write errors are ignored: the event matters to those who watch now."""
        with contextlib.suppress(DomainError, OSError):
            self.add(event)

    def write(self) -> None:
        """Writes the events that are not in the file yet. Raises DomainError DISK_FULL, or OSError without a folder."""
        lines = b"".join(msgspec.json.encode(entry) + b"\n" for entry in self.entries[self._written :])
        if not lines:
            return
        with writing_to(self._path.parent, len(lines)):
            # Not kept open: a trainer may have thousands of runs.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                append(descriptor, lines)
            finally:
                os.close(descriptor)
        self._written = len(self.entries)

    async def follow(self, after: int, ended: Callable[[], bool] = lambda: False) -> AsyncIterator[Entry]:
        """Every event after number `after`, then new ones as they come, until the run has `ended`."""
        index = after
        while True:
            while index < len(self.entries):
                yield self.entries[index]
                index += 1
            if ended():
                return
            await self._changed.wait()

    def steps(self) -> dict[int, StepEvent]:
        return {entry.event.step: entry.event for entry in self.entries if isinstance(entry.event, StepEvent)}

    def evaluations(self, environment: str = "") -> dict[int, EvaluationEvent]:
        """Those in one environment, by step; the run's own without a name."""
        found = (entry.event for entry in self.entries if isinstance(entry.event, EvaluationEvent))
        return {event.step: event for event in found if event.environment == environment}
