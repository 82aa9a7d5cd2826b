"""The runs that the console shows: the folders of runs below a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import structlog

from mulligan.cli.progress import SUCCESS
from mulligan.common.errors import DomainError
from mulligan.console.series import RunSeries
from mulligan.trainer.folder import RunFolder, RunRecord, run_folders

log = structlog.get_logger()


@dataclass
class ShownRun:
    """A run as it is known. `error` says why its settings cannot be read; then `record` is None."""

    key: str  # its id, or its folder where two have the same id
    folder: RunFolder
    series: RunSeries
    record: RunRecord | None = None
    error: str = ""
    _stamp: int = -1

    def update(self) -> None:
        """Reads what changed since."""
        try:
            changed = (self.folder.path / "run.json").stat().st_mtime_ns
            if changed != self._stamp:
                self._stamp = changed
                self.record, self.error = self.folder.record(), ""
            self.series.update()
        except (DomainError, OSError) as error:
            self.error = str(error)

    @property
    def state(self) -> str:
        if self.record is None:
            return "damaged"
        return str(self.record.state)

    def last(self, metric: str) -> float | None:
        """The latest value of a metric."""
        found = self.series.series.get(metric)
        return None if found is None else found.last

    @property
    def in_training(self) -> float | None:
        """The latest success of the role "first", or where there is none, of the role that was played first."""
        names = [name for name in self.series.series if name.startswith(SUCCESS)]
        name = min(names, key=lambda name: name != f"{SUCCESS}first", default=None)  # the first of equals
        return None if name is None else self.last(name)

    def setting(self, *names: str) -> object:
        """Of the run's settings as they were given; None where there is no such one."""
        found: object = {} if self.record is None else self.record.settings
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found


class Library:
    """The runs below `root`, the latest first. `update` finds new ones, and reads what known ones wrote since."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._runs: dict[Path, ShownRun] = {}

    def update(self) -> None:
        found = set(run_folders(self.root))
        for path in self._runs.keys() - found:
            del self._runs[path]
        names = [path.name for path in found]
        for path in found - self._runs.keys():
            folder = RunFolder(path)
            key = path.name if names.count(path.name) == 1 else str(path.relative_to(self.root)).replace(os.sep, "~")
            self._runs[path] = ShownRun(key, folder, RunSeries(folder))
        for run in self._runs.values():
            run.update()

    @property
    def runs(self) -> list[ShownRun]:
        return sorted(self._runs.values(), key=_created, reverse=True)

    def run(self, key: str) -> ShownRun | None:
        return next((run for run in self._runs.values() if run.key == key), None)


def _created(run: ShownRun) -> tuple[float, str]:
    return (0.0 if run.record is None else run.record.created_at.timestamp(), run.key)
