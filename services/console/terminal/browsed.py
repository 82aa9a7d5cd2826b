"""The run that the browser shows, and what its screens know of the app."""

from __future__ import annotations

from pathlib import Path

from textual.app import App

from mulligan.console.index import ExperienceIndex
from mulligan.console.library import Library, ShownRun
from mulligan.console.watcher import Watcher


class BrowsedRun:
    """The run in `folder`, which has a run.json."""

    def __init__(self, folder: Path, index: ExperienceIndex) -> None:
        self.key = folder.name
        self.journal = folder / "journal"
        self.index = index
        self.watcher = Watcher(Library(folder), index)

    @property
    def _shown(self) -> ShownRun | None:
        return self.watcher.run(self.key)

    @property
    def state(self) -> str:
        run = self._shown
        return "" if run is None else f"{run.state}, step {run.series.steps} of {run.setting('steps')}"

    @property
    def model(self) -> str:
        """The model that the run trains."""
        run = self._shown
        return "" if run is None else str(run.setting("model", "source") or "")


class BrowserApp(App[None]):
    """An app of one run."""

    def __init__(self, browsed: BrowsedRun) -> None:
        super().__init__()
        self.browsed = browsed
