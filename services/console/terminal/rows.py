"""The list of experiences: pages of the index, read when they come into view."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.message import Message

from mulligan.console.index import ExperienceFilter, ExperienceIndex, ExperienceRow, FoundExperiences
from mulligan.console.reading import signed
from mulligan.console.terminal.items import ItemsView
from mulligan.console.terminal.layout import outcome_style
from mulligan.console.terminal.text import fitted, one_line

PAGE = 200
_KEPT = 20  # pages


class RowsView(ItemsView):
    """A line for each experience. `wanted` filters them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "choose(1)"),
        Binding("up", "choose(-1)"),
        Binding("pagedown,space", "pages(1)"),
        Binding("pageup", "pages(-1)"),
        Binding("home", "choose(-2147483648)"),
        Binding("end", "choose(2147483648)"),
    ]

    class Counted(Message):
        """Rows were read."""

    def __init__(self, index: ExperienceIndex, wanted: ExperienceFilter) -> None:
        super().__init__()
        self._index = index
        self.wanted = wanted
        self.count = 0
        self.environments = 1
        self._pages: dict[int, Sequence[ExperienceRow]] = {}
        self._asked: set[int] = set()
        self._reading = 0  # which filter and state of the index the pages are of

    @property
    def item_count(self) -> int:
        return self.count

    @property
    def line_count(self) -> int:
        return self.count

    def lines_of(self, item: int) -> tuple[int, int]:
        return item, item + 1

    @property
    def row(self) -> ExperienceRow | None:
        """The chosen one; None while it is not read."""
        return self._row(self.chosen) if self.count else None

    def _row(self, place: int) -> ExperienceRow | None:
        rows = self._pages.get(place // PAGE, ())
        return rows[place % PAGE] if place % PAGE < len(rows) else None

    def line(self, place: int) -> Text:
        for near in (place, place + PAGE // 2, place - PAGE // 2):
            self._ask(near // PAGE)
        row = self._row(place)
        return Text("…", "dim") if row is None else row_text(row, self.room, several=self.environments > 1)

    def action_pages(self, by: int) -> None:
        self.choose(self.chosen + by * max(self.size.height - 1, 1))

    def on_resize(self) -> None:
        self.changed()

    def _ask(self, page: int) -> None:
        """Reads the page, if it is there and was not read."""
        if page in self._asked or not 0 <= page * PAGE < self.count:
            return
        self._asked.add(page)
        self.run_worker(self._read(page, self._reading), group="pages")

    async def _read(self, page: int, reading: int) -> None:
        found = await asyncio.to_thread(self._index.find, self.wanted, after=page * PAGE, limit=PAGE)
        if reading != self._reading:
            return
        self._pages[page] = found.rows
        if len(self._pages) > _KEPT:
            far = max(self._pages, key=lambda one: abs(one - self.chosen // PAGE))
            del self._pages[far]
            self._asked.discard(far)
        self.refresh()

    def _around(self, name: str) -> tuple[FoundExperiences, int, int | None]:
        """The page with this experience, its number, and the place of the experience; the first page where it is not
        among them. The index may grow between two questions, so the answer is checked."""
        wanted = self.wanted
        while (place := self._index.place(wanted, name)) is not None:
            page = place // PAGE
            found = self._index.find(wanted, after=page * PAGE, limit=PAGE)
            rows = found.rows[place % PAGE : place % PAGE + 1]
            if rows and rows[0].experience_id == name:
                return found, page, place
        return self._index.find(wanted, limit=PAGE), 0, None

    async def read_anew(self, wanted: ExperienceFilter | None = None) -> None:
        """After the index has grown, or for another filter. The chosen experience stays chosen where it is still
        among them, and stays at its line of the screen."""
        self.wanted = wanted or self.wanted
        self._reading += 1
        reading, row = self._reading, self.row
        found, found_page, place = await asyncio.to_thread(self._around, "" if row is None else row.experience_id)
        if place is None:
            place = self.chosen if wanted is None else 0
        page = place // PAGE
        choices = await asyncio.to_thread(self._index.choices, self.wanted.run)
        if reading != self._reading:
            return
        above = self.chosen - self.scroll_offset.y
        self._pages, self._asked = ({page: found.rows}, {page}) if page == found_page else ({}, set())
        self.count, self.environments = found.count, len(choices["environment"])
        self.chosen = place
        self.changed()
        self.scroll_to(y=max(self.chosen - max(above, 0), 0), animate=False, force=True)
        self.post_message(self.Counted())
        self.post_message(self.Chosen())


def row_text(row: ExperienceRow, width: int, *, several: bool) -> Text:
    """A row in so many cells. Narrow ones have fewer columns."""
    text = Text(no_wrap=True)
    text.append(f"{row.step:>5} ", "bold")
    room = width - 6
    task = 12 if width < 60 else 16
    text.append(fitted(one_line(row.task_id), min(task, max(room, 1))) + " ")
    room -= task + 1
    wide = width >= 90
    outcome = 9 if wide else 3
    shown = one_line(row.outcome)
    text.append(fitted(shown if wide else shown[:3], outcome) + " ", outcome_style(row.outcome))
    room -= outcome + 1
    if several and width >= 60:
        text.append(fitted(one_line(row.environment), 16) + " ", "dim")
        room -= 17
    ends = ""
    if width >= 110:
        memory = f"{row.memory} from memory" if row.memory else ""
        ends = f"{row.turns:>4} turns {row.tokens:>6} tokens {memory:<14}"
        room -= cell_len(ends) + 1
    gain = signed(row.gain)
    gained = f" {gain}" if gain and room >= 24 else ""
    room = max(room - cell_len(gained), 1)
    rewards = one_line(row.rewards) or "–"
    if cell_len(rewards) > room:  # without the roles
        rewards = " · ".join(part.rpartition(" ")[2] for part in rewards.split(" · "))
    best = "green" if (row.reward or 0) > 0 else "red" if row.reward is not None else "dim"
    text.append(fitted(rewards, room), best)
    text.append(gained, "green" if (row.gain or 0) > 0 else "red")
    text.append(f" {ends}" if ends else "", "dim")
    return text
