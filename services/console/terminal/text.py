"""Text that data cannot steer: control characters are written out, and lines are folded by the cells that they take."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from mulligan.common.text import safe

_TAB = 4


def one_line(text: object) -> str:
    """Safe, and without line breaks."""
    return safe(text).replace("\n", " / ").replace("\t", " ")


def fitted(text: str, width: int) -> str:
    """Exactly so many cells: cut, then with an ellipsis, or filled up."""
    if cell_len(text) > width > 1:
        return set_cell_size(text, width - 1) + "…"
    return set_cell_size(text, width)


def folded(text: object, width: int) -> Iterator[str]:
    """The lines of a text, each of `width` cells at most; broken between words where that is possible."""
    for line in safe(text).expandtabs(_TAB).split("\n"):
        begin = 0
        while True:
            end = _fits(line, begin, width)
            if end == len(line):
                yield line[begin:]
                break
            space = line.rfind(" ", begin + 1, end + 1)
            if space > begin and line[begin:space].strip():
                yield line[begin:space]
                begin = space + 1
            else:
                yield line[begin:end]
                begin = end


def _fits(line: str, begin: int, width: int) -> int:
    """Up to where the line fits, at least one character."""
    if line.isascii():
        return min(len(line), begin + max(width, 1))
    cells, place = 0, begin
    while place < len(line):
        cells += cell_len(line[place])
        if cells > width and place > begin:
            return place
        place += 1
    return place


def padded(line: Text, width: int) -> Text:
    """A copy of exactly so many cells."""
    found = line.copy()
    found.truncate(width, pad=True)
    return found
