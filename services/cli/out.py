"""All output of the commands. Data never act as markup or control sequences, and ids are never cut.

Results go to stdout; progress, warnings and errors go to stderr.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mulligan.common.text import JOINERS, safe

_PIPE_WIDTH = 100_000  # lines of a pipe are not folded
_FOLDED = 8  # columns that a folded cell has at least
_GAP = 2
# Without a terminal: when the first line of progress comes, and the time between further ones.
FIRST_SECONDS = 2.0
EVERY_SECONDS = 15.0
Styled = str | tuple[str, str]  # a text, or a text with a style of rich


def json_safe(encoded: str) -> str:
    """The JSON with every control character as an escape of JSON, so that `safe` changes nothing in it."""
    return "".join(one if one.isprintable() or one == "\n" or one in JOINERS else _json_escape(one) for one in encoded)


def _json_escape(one: str) -> str:
    units = one.encode("utf-16-be")
    return "".join(f"\\u{units[place : place + 2].hex()}" for place in range(0, len(units), 2))


def console(*, err: bool = False) -> Console:
    """A console for live displays. Print only `Text` made from `safe` text."""
    found = Console(stderr=err, highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = _PIPE_WIDTH
    return found


def show(*parts: object) -> None:
    """Prints a line of the result."""
    print(*map(safe, parts))


def note(*parts: object) -> None:
    """Prints a line to stderr."""
    print(*map(safe, parts), file=sys.stderr, flush=True)


def line(*parts: Styled) -> None:
    """Prints a line of the result, with colours on a terminal."""
    text = Text()
    for part in parts:
        words, style = (part, "") if isinstance(part, str) else part
        text.append(safe(words), style)
    console().print(text, soft_wrap=True)


def fail(problem: object, status: int = 1) -> NoReturn:
    """Prints the problem and ends the program. Status 2 means that the command was called wrongly."""
    note(f"error: {problem}")
    sys.exit(status)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, whole: Sequence[str] = ()) -> None:
    """Prints a table. Columns in `whole`, such as ids, are never cut or folded, even on a narrow terminal."""
    cells = [[safe(cell).replace("\n", " / ") for cell in row] for row in rows]
    shown = Table(box=None)
    needed = 0
    for index, name in enumerate(columns):
        widest = max([cell_len(name), *(cell_len(row[index]) for row in cells)])
        least = widest if name in whole else min(widest, _FOLDED)
        shown.add_column(name, no_wrap=name in whole, min_width=least, overflow="fold")
        needed += least + _GAP
    for row in cells:
        shown.add_row(*(Text(cell, overflow="fold") for cell in row))
    output = console()
    output.width = max(output.width, needed)
    output.print(shown, soft_wrap=False, crop=False)


class Heartbeat:
    """Shows in a pipe that a command goes on: a line on stderr when nothing was said for a while. A context manager.

    The first line comes after `first` seconds, each further one after `every` seconds. A line is `text()` and the
    seconds since the block began.
    """

    def __init__(self, text: Callable[[], str], *, first: float = FIRST_SECONDS, every: float = EVERY_SECONDS):
        self._text = text
        self._first = first
        self._every = every
        self._began = time.monotonic()
        self._changed = threading.Condition()
        self._said = False
        self._done = False
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def said(self) -> None:
        """Call it after each other line: the next one of the heartbeat comes after `every` seconds."""
        with self._changed:
            self._said = True
            self._changed.notify()

    def __enter__(self) -> Heartbeat:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._done = True
            self._changed.notify()
        self._thread.join()

    def _beat(self) -> None:
        seconds = self._first
        with self._changed:
            while not self._done:
                self._said = False
                self._changed.wait_for(lambda: self._said or self._done, seconds)
                seconds = self._every
                if not (self._said or self._done):
                    note(f"{self._text()} … {time.monotonic() - self._began:.0f} s")


@contextmanager
def working(text: str) -> Iterator[None]:
    """Shows on stderr that something is in progress: live on a terminal, otherwise a line now and then."""
    output = console(err=True)
    if not output.is_terminal:
        note(f"{text} …")
        with Heartbeat(lambda: text, first=EVERY_SECONDS):
            yield
        return
    began = time.monotonic()

    class Elapsed:
        def __rich__(self) -> Text:
            return Text(f"{safe(text)} … {time.monotonic() - began:.0f} s")

    with output.status(Elapsed()):
        yield
