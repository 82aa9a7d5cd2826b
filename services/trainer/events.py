"""The events of a run: numbered from 1, kept in `events.jsonl`, and followed live by any number of watchers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec


class StepEvent(msgspec.Struct, frozen=True, tag="step"):
    step: int
    metrics: dict[str, float]


class EvaluationEvent(msgspec.Struct, frozen=True, tag="evaluation"):
    step: int  # steps trained before it
    success: float
    mean_reward: float
    attempts: int
    excluded: int


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
    """Appends to the file before anyone sees an event. A torn last line, left by a crash, is cut off."""

    def __init__(self, path: Path):
        self.entries: list[Entry] = []
        end = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                self.entries.append(_DECODER.decode(line))
                end += len(line)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(end)
        self._changed = asyncio.Event()

    def add(self, event: Event) -> None:
        entry = Entry(len(self.entries) + 1, datetime.now(UTC), event)
        self._file.write(msgspec.json.encode(entry) + b"\n")
        self.entries.append(entry)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, after: int) -> AsyncIterator[Entry]:
        """Every event after number `after`, then new ones as they come. The caller ends it."""
        index = after
        while True:
            changed = self._changed
            while index < len(self.entries):
                yield self.entries[index]
                index += 1
            await changed.wait()

    def steps(self) -> dict[int, StepEvent]:
        return {entry.event.step: entry.event for entry in self.entries if isinstance(entry.event, StepEvent)}

    def evaluations(self) -> dict[int, EvaluationEvent]:
        return {entry.event.step: entry.event for entry in self.entries if isinstance(entry.event, EvaluationEvent)}
