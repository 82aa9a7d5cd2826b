"""The metrics of a run as series: a point for each training step and each evaluation, read as they are written."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite

from mulligan.common.state_files import LineLog
from mulligan.trainer.events import Entry, EvaluationEvent, NoticeEvent, StateEvent, StepEvent
from mulligan.trainer.folder import RunFolder

NOTICES = 200  # that are kept of a run, the latest


@dataclass
class Series:
    """One metric. `steps` ascend; `changed` has for each point the number of the event that it is of, so that a reader
    gets what is new to it."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    changed: array[int] = field(default_factory=lambda: array("q"))

    def put(self, step: int, value: float, number: int) -> None:
        """A later point of the same step replaces the earlier one: the step was repeated."""
        place = bisect_left(self.steps, step)
        if place < len(self.steps) and self.steps[place] == step:
            self.values[place], self.changed[place] = value, number
        else:
            self.steps.insert(place, step)
            self.values.insert(place, value)
            self.changed.insert(place, number)

    def after(self, number: int) -> tuple[list[int], list[float | None]]:
        """Steps and values of the points of later events than this one, for JSON: None for a value that is not finite,
        where a chart has a gap."""
        places = [place for place, one in enumerate(self.changed) if one > number]
        values = (self.values[place] for place in places)
        return [self.steps[place] for place in places], [value if isfinite(value) else None for value in values]

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None


class RunSeries:
    """All series of a run. `update` reads the events that were written since."""

    def __init__(self, folder: RunFolder) -> None:
        self._lines = LineLog(folder.events_file, Entry)
        self._read = 0  # bytes
        self.series: dict[str, Series] = {}
        self.notices: list[Entry] = []
        self.state = ""
        self.cursor = 0  # number of the last event
        self.steps = 0  # trained

    def update(self) -> None:
        """Raises DomainError STATE_DAMAGED where the disk does not give the file's content."""
        try:
            if self._lines.path.stat().st_size == self._read:
                return
        except FileNotFoundError:
            return
        entries, self._read = self._lines.read_from(self._read)
        self.add(entries)

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.cursor = max(self.cursor, entry.number)
            match entry.event:
                case StepEvent(step, metrics):
                    self.steps = max(self.steps, step + 1)
                    for name, value in metrics.items():
                        self._put(name, step, value, entry.number)
                case EvaluationEvent():
                    self._evaluated(entry.event, entry.number)
                case StateEvent(state):
                    self.state = state
                    self._note(entry)
                case NoticeEvent():
                    self._note(entry)

    def _evaluated(self, event: EvaluationEvent, number: int) -> None:
        begin = f"{event.environment}/evaluation" if event.environment else "evaluation"
        found = {"success": event.success, "mean_reward": event.mean_reward, "excluded": event.excluded}
        for name, value in {**found, **event.metrics}.items():
            self._put(f"{begin}/{name}", event.step, value, number)

    def _put(self, name: str, step: int, value: float, number: int) -> None:
        self.series.setdefault(name, Series()).put(step, value, number)

    def _note(self, entry: Entry) -> None:
        self.notices.append(entry)
        del self.notices[:-NOTICES]
