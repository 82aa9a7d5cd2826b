"""The events of a run: numbered from 1, kept in `events.jsonl`, and followed live by any number of watchers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import structlog

from mulligan.common.errors import DomainError
from mulligan.common.state_files import LineLog, in_utc
from mulligan.common.tasks import Broadcast
from mulligan.trainer.folder import Count, RunState

log = structlog.get_logger()

if TYPE_CHECKING:
    Metrics = dict[str, float]
else:
    Metrics = dict[str, float | None]  # in the file; JSON has null for a number that is not finite

Number = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class StepEvent(msgspec.Struct, frozen=True, tag="step"):
    """A metric that is not finite, such as an infinite gradient norm, is NaN when it is read from the file."""

    step: Count
    metrics: Metrics

    def __post_init__(self) -> None:
        _fill_in(self.metrics)


class EvaluationEvent(msgspec.Struct, frozen=True, tag="evaluation"):
    step: Count  # steps trained before it
    success: float
    mean_reward: float
    attempts: Count
    excluded: Count
    metrics: Metrics = {}  # of the protocols, by LABEL/METRIC
    environment: str = ""  # empty: the run's own

    def __post_init__(self) -> None:
        _fill_in(self.metrics)


def _fill_in(metrics: Metrics) -> None:
    for name in [name for name, value in metrics.items() if value is None]:
        metrics[name] = nan


class StateEvent(msgspec.Struct, frozen=True, tag="state"):
    state: RunState
    error: str = ""
    told: str = ""  # as in RunRecord


class NoticeEvent(msgspec.Struct, frozen=True, tag="notice"):
    text: str


Event = StepEvent | EvaluationEvent | StateEvent | NoticeEvent


class Entry(msgspec.Struct, frozen=True):
    number: Number
    time: datetime
    event: Event

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "time", in_utc(self.time))


class EventLog:
    """`add` appends an event, wakes the watchers and writes the file. If writing fails, the watchers still see the
    event, and the next write includes it.

    A damaged line costs its event alone. `damage` says which are lost. Opening raises DomainError STATE_DAMAGED where
    the disk does not give the file's content.
    """

    def __init__(self, path: Path):
        self._lines = LineLog(path, Entry)
        self.entries, damaged = self._lines.read()
        self.damage = [f"{line}: its event is lost" for line in damaged]
        numbers = sorted(entry.number for entry in self.entries)
        if missing := ", ".join(_missing(numbers)):
            self.damage.append(f"events that {path} lacks: {missing}")
        for text in self.damage:
            log.warning("damaged events", text=text)
        last = numbers[-1] if numbers else 0
        self._next = max(last, len(self.entries) + len(damaged)) + 1  # a watcher may have seen those after the last one
        self._written = len(self.entries)
        self._changed = Broadcast()

    def add(self, event: Event) -> None:
        """Raises the errors of `write`, after the watchers were told."""
        self.entries.append(Entry(self._next, datetime.now(UTC), event))
        self._next += 1
        self._changed.wake_all()
        self.write()

    def tell(self, event: Event) -> None:
        """As `add`, but write errors are ignored: the event matters to those who watch now."""
        with contextlib.suppress(DomainError, OSError):
            self.add(event)

    def write(self) -> None:
        """Writes the events that are not in the file yet. Raises DomainError DISK_FULL, or OSError without a folder."""
        self._lines.append(self.entries[self._written :])
        self._written = len(self.entries)

    def sync(self) -> None:
        """Writes them, and waits until all events are on the disk. Raises as `write` does."""
        self.write()
        if self.entries:
            self._lines.sync()

    async def follow(self, after: int, ended: Callable[[], bool] = lambda: False) -> AsyncIterator[Entry]:
        """Every event after number `after`, then new ones as they come, until the run has `ended`."""
        index = 0
        while True:
            while index < len(self.entries):
                if self.entries[index].number > after:
                    yield self.entries[index]
                index += 1
            if ended():
                return
            await self._changed.wait()

    @property
    def newest(self) -> tuple[StepEvent | None, EvaluationEvent | None]:
        """The last step, and the last evaluation in the run's own environment."""
        events = [entry.event for entry in reversed(self.entries)]
        step = next((event for event in events if isinstance(event, StepEvent)), None)
        own = (event for event in events if isinstance(event, EvaluationEvent) and not event.environment)
        return step, next(own, None)

    def steps(self) -> dict[int, StepEvent]:
        return {entry.event.step: entry.event for entry in self.entries if isinstance(entry.event, StepEvent)}

    def evaluations(self, environment: str = "") -> dict[int, EvaluationEvent]:
        """Those in one environment, by step; the run's own without a name."""
        found = (entry.event for entry in self.entries if isinstance(entry.event, EvaluationEvent))
        return {event.step: event for event in found if event.environment == environment}


def _missing(numbers: Sequence[int]) -> Iterator[str]:
    """What lies between 0 and these numbers, which ascend: `2, 3, 7 to 99`."""
    for before, number in pairwise((0, *numbers)):
        between = range(before + 1, number)
        yield from map(str, between) if len(between) < 3 else [f"{between[0]} to {between[-1]}"]
