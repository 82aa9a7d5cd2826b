"""A view of many lines, of which some belong to an item that can be chosen. Only the lines that are seen are drawn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from mulligan.console.terminal.layout import Laid
from mulligan.console.terminal.text import padded

GUTTER = 2  # cells before each line; they show which item is chosen


class ItemsView(ScrollView, can_focus=True):
    """Subclasses say how many items and lines there are, and give the lines."""

    DEFAULT_CSS = """
    ItemsView { overflow-x: hidden; overflow-y: scroll; height: 1fr; scrollbar-size-vertical: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "choose(1)"),
        Binding("k", "choose(-1)"),
        Binding("space", "page_down"),
        Binding("enter", "open"),
    ]

    class Chosen(Message):
        """Another item is chosen."""

    class Opened(Message):
        """The chosen item is to be opened."""

    def __init__(self) -> None:
        super().__init__(classes="-ansi-scrollbar")  # in the terminal's own colours, too
        self.chosen = 0

    @property
    def item_count(self) -> int:
        raise NotImplementedError

    @property
    def line_count(self) -> int:
        raise NotImplementedError

    def lines_of(self, item: int) -> tuple[int, int]:
        """The first line of an item, and the one after its last."""
        raise NotImplementedError

    def line(self, place: int) -> Text:
        """Without the gutter. Data in it are safe."""
        raise NotImplementedError

    def is_chosen(self, place: int) -> bool:
        """Whether the line is of the chosen item."""
        if not self.item_count:
            return False
        first, end = self.lines_of(self.chosen)
        return first <= place < end

    @property
    def room(self) -> int:
        """Cells of a line."""
        return max(self.scrollable_content_region.width - GUTTER, 1)

    def choose(self, item: int) -> None:
        """The nearest item that there is. It is scrolled to."""
        self.chosen = max(0, min(item, self.item_count - 1))
        if self.item_count:
            first, end = self.lines_of(self.chosen)
            height = max(self.scrollable_content_region.height, 1)
            self.scroll_to_region(Region(0, first, 1, min(end - first, height)), animate=False, force=True)
        self.refresh()
        self.post_message(self.Chosen())

    def changed(self) -> None:
        """The items or lines are others now."""
        self.virtual_size = Size(self.scrollable_content_region.width, self.line_count)
        self.chosen = max(0, min(self.chosen, self.item_count - 1))
        self.refresh()

    def render_line(self, y: int) -> Strip:
        place = y + self.scroll_offset.y
        width = self.size.width
        if place >= self.line_count:
            return Strip.blank(width, self.rich_style)
        mark = Segment("▌ " if self.is_chosen(place) else "  ", Style(color="blue", bold=True))
        text = padded(self.line(place), max(width - GUTTER, 1))
        strip = Strip([mark, *(one for one in text.render(self.app.console) if one.text)])
        return strip.adjust_cell_length(width).apply_style(self.rich_style)

    def action_choose(self, by: int) -> None:
        self.choose(self.chosen + by)

    def action_open(self) -> None:
        if self.item_count:
            self.post_message(self.Opened())


class LaidView(ItemsView):
    """Lines that are laid out anew for each width."""

    def __init__(self, lay_out: Callable[[int], Laid]) -> None:
        super().__init__()
        self._lay_out = lay_out
        self._laid: Laid | None = None
        self._failing = -1  # the line of the turn that was gone to

    @property
    def laid(self) -> Laid:
        if self._laid is None or self._laid.width != self.room:
            self._laid, self._failing = self._lay_out(self.room), -1
        return self._laid

    @property
    def item_count(self) -> int:
        return len(self.laid.starts)

    @property
    def line_count(self) -> int:
        return len(self.laid.lines)

    def lines_of(self, item: int) -> tuple[int, int]:
        starts = self.laid.starts
        return starts[item], starts[item + 1] if item + 1 < len(starts) else self.line_count

    def line(self, place: int) -> Text:
        text = self.laid.lines[place]
        if place != self._failing:
            return text
        marked = padded(text, self.room)
        marked.stylize("reverse")
        return marked

    def on_resize(self) -> None:
        self.changed()

    def lay_out_anew(self) -> None:
        self._laid = None
        self.changed()

    def go_to_failing(self) -> bool:
        """To the next turn that failed, after the last one to the first. False where there is none."""
        failing = self.laid.failing
        if not failing:
            return False
        self._failing = failing[bisect_right(failing, self._failing) % len(failing)]
        self.chosen = max(bisect_right(self.laid.starts, self._failing) - 1, 0)
        self.scroll_to(y=max(self._failing - self.size.height // 3, 0), animate=False, force=True)
        self.refresh()
        self.post_message(self.Chosen())
        return True
