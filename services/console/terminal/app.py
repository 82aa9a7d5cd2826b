"""The browser itself: reads the run while it goes on, and shows it in the colours of the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import structlog
from textual.binding import Binding, BindingType

from mulligan.console.index import ExperienceIndex
from mulligan.console.terminal.browsed import BrowsedRun, BrowserApp
from mulligan.console.terminal.items import ItemsView
from mulligan.console.terminal.screens import BrowserScreen, ListScreen

THEMES = ("ansi-dark", "textual-light", "textual-dark")  # the first one has the terminal's own colours
_MOST = 20  # warnings that are kept


class ExperienceBrowser(BrowserApp):
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
        Binding("ctrl+c", "quit", priority=True),
        Binding("t", "colours"),
    ]

    def __init__(self, folder: Path, index: ExperienceIndex) -> None:
        super().__init__(BrowsedRun(folder, index))
        self._themes = itertools.cycle(THEMES)
        self.theme = next(self._themes)

    def on_mount(self) -> None:
        self.push_screen(ListScreen())
        self.run_worker(self._follow(), group="follow")

    async def _follow(self) -> None:
        browsed = self.browsed
        seen: tuple[int, int, str] | None = None
        async with browsed.watcher.running():
            async for _ in browsed.watcher.changes():
                now = (browsed.watcher.added, browsed.watcher.indexing, browsed.state)
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
