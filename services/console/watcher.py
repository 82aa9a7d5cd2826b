"""Reads what runs write, once for all pages: every second while the console runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from mulligan.common.tasks import cancel
from mulligan.console.index import ExperienceIndex
from mulligan.console.library import Library, ShownRun
from mulligan.trainer.journal import journal_file, journaled_steps

log = structlog.get_logger()
SECONDS = 1.0  # between two looks


class Watcher:
    """`indexing` counts the steps whose experiences are still to be read, `added` those that were read."""

    def __init__(self, library: Library, index: ExperienceIndex) -> None:
        self._library = library
        self._index = index
        self._runs: list[ShownRun] = []
        self._changed = asyncio.Event()
        self._read: dict[Path, tuple[int, int]] = {}  # size and time of change of each step's file
        self.indexing = 0
        self.added = 0

    @property
    def root(self) -> Path:
        return self._library.root

    @property
    def runs(self) -> list[ShownRun]:
        """The latest first."""
        return self._runs

    def run(self, key: str) -> ShownRun | None:
        return next((run for run in self._runs if run.key == key), None)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self._look()
        tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._read_experiences())]
        try:
            yield
        finally:
            for task in tasks:
                await cancel(task)

    async def changes(self) -> AsyncIterator[None]:
        """At once, and then after each look, without end."""
        yield
        while True:
            await self._changed.wait()
            yield

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SECONDS)
            await self._look()

    async def _look(self) -> None:
        await asyncio.to_thread(self._library.update)
        self._runs = self._library.runs
        self._changed.set()
        self._changed = asyncio.Event()

    async def _read_experiences(self) -> None:
        while True:
            places = await asyncio.to_thread(self._changed_steps)
            self.indexing = len(places)
            for run, step, file, state in places:
                try:
                    self.added += await asyncio.to_thread(self._index.add_step, run.key, step, file)
                    self._read[file] = state
                except OSError as error:
                    log.warning("experiences cannot be read", run=run.key, step=step, cause=str(error))
                except Exception as error:  # noqa: BLE001 - what one run's file says keeps no other's from being read
                    log.warning("experiences cannot be read", run=run.key, step=step, cause=repr(error))
                    self._read[file] = state  # not again before it changes
                self.indexing -= 1
            await asyncio.sleep(SECONDS)

    def _changed_steps(self) -> list[tuple[ShownRun, int, Path, tuple[int, int]]]:
        """The files that changed since they were read, the latest step of each run first."""
        found = []
        for run in self._runs:
            for step in reversed(journaled_steps(run.folder.journal)):
                file = journal_file(run.folder.journal, step)
                with contextlib.suppress(FileNotFoundError):  # it was set aside
                    stat = file.stat()
                    state = (stat.st_size, stat.st_mtime_ns)
                    if self._read.get(file) != state:
                        found.append((run, step, file, state))
        return found
