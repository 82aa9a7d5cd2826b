"""The events of a run: numbered from 1, kept in `events.jsonl`, and followed live by any number of watchers."""

from __future__ import annotations

import asyncio
import os
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
        self._path = path
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            self.entries.extend(map(_DECODER.decode, whole))
            if len(whole) < len(lines):
                os.truncate(path, sum(map(len, whole)))
        self._changed = asyncio.Event()

    def add(self, event: Event) -> None:
        entry = Entry(len(self.entries) + 1, datetime.now(UTC), event)
        with self._path.open("ab", buffering=0) as file:  # not kept open: a trainer may have thousands of runs
            file.write(msgspec.json.encode(entry) + b"\n")
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
