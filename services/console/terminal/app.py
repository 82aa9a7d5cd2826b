"""The browser itself: reads the run while it goes on, and shows it in the colours of the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import structlog
from textual.app import App
from textual.binding import Binding, BindingType

from mulligan.console.index import ExperienceIndex
from mulligan.console.library import Library, ShownRun
from mulligan.console.terminal.items import ItemsView
from mulligan.console.terminal.screens import BrowserScreen, ListScreen
from mulligan.console.watcher import Watcher

THEMES = ("ansi-dark", "textual-light", "textual-dark")  # the first one has the terminal's own colours
_MOST = 20  # warnings that are kept


class ExperienceBrowser(App[None]):
    """Shows the run in `folder`, which has a run.json."""

    TITLE = "Mulligan"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #head { height: 1; text-style: bold; text-wrap: nowrap; text-overflow: ellipsis; }
    #foot { height: auto; max-height: 4; }
    Input, Input:focus { border: none; height: 1; padding: 0; display: none; }
    Input.open { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit"),
        Binding("ctrl+c", "quit", show=False),
        Binding("t", "colours"),
    ]

    def __init__(self, folder: Path, index: ExperienceIndex) -> None:
        super().__init__()
        self.run_key = folder.name
        self.journal = folder / "journal"
        self.index = index
        self.watcher = Watcher(Library(folder), index)
        self._themes = itertools.cycle(THEMES)
        self.theme = next(self._themes)

    def on_mount(self) -> None:
        self.push_screen(ListScreen())
        self.run_worker(self._follow(), group="follow")

    @property
    def _run_shown(self) -> ShownRun | None:
        return self.watcher.run(self.run_key)

    @property
    def run_state(self) -> str:
        run = self._run_shown
        return "" if run is None else f"{run.state}, step {run.series.steps} of {run.setting('steps')}"

    @property
    def model(self) -> str:
        """The model that the run trains."""
        run = self._run_shown
        return "" if run is None else str(run.setting("model", "source") or "")

    async def _follow(self) -> None:
        seen: tuple[int, int, str] | None = None
        async with self.watcher.running():
            async for _ in self.watcher.changes():
                now = (self.watcher.added, self.watcher.indexing, self.run_state)
                if now != seen and isinstance(self.screen, BrowserScreen):
                    seen = now
                    for screen in self.screen_stack:
                        if isinstance(screen, BrowserScreen) and screen.query(ItemsView):
                            await screen.follow()

    def action_colours(self) -> None:
        self.theme = next(self._themes)


@contextmanager
def warnings_kept() -> Iterator[list[str]]:
    """What is logged in this block is kept, the first of each kind, instead of written across the screen."""
    kept: dict[str, None] = {}
    found: list[str] = []

    def keep(_: object, __: str, event: MutableMapping[str, Any]) -> str:
        said = f"{event.pop('event', '')}: " + ", ".join(f"{name} {value}" for name, value in event.items())
        if said not in kept and len(kept) < _MOST:
            kept[said] = None
            found.append(said)
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[keep])
    try:
        yield found
    finally:
        structlog.configure(**before)
