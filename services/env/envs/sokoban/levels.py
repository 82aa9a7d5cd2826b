"""Sokoban's level files: the XSB format, and Boxoban's, which is XSB with a comment before each level.

`#` is a wall, `@` the player (`+` on a goal), `$` a box (`*` on a goal), `.` a goal; floor is a space, `-` or `_`.
Levels are separated by lines that are no rows: empty lines, titles and comments (`; …`). A level may also stand in one
line, with `|` between rows and numbers for repetitions (`3#|#.#`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mulligan.env.envs.sokoban.boards import (
    BOX,
    BOX_ON_GOAL,
    FLOOR,
    GOAL,
    PLAYER,
    PLAYER_ON_GOAL,
    WALL,
    SokobanBoard,
    Undecided,
    least_pushes,
    solve,
)
from mulligan.env.grid_files import MAX_STEPS, Placed, read_text

_SYMBOLS = {"#": WALL, "@": PLAYER, "+": PLAYER_ON_GOAL, "$": BOX, "*": BOX_ON_GOAL, ".": GOAL, " ": FLOOR}
_SYMBOLS |= {"-": FLOOR, "_": FLOOR}
_ENCODED = {*_SYMBOLS, *"0123456789|"}
_MAX_SIDE = 64
_MAX_STATES = 5_000  # of a level that are looked at: a large one would take minutes
EXPECTED = "expected # (wall), @ + (player), $ * (box), . (goal), and a space, - or _ (floor)"


def read_levels(path: Path) -> Iterator[Placed[SokobanBoard]]:
    """Reads levels. Raises ValueError, which names the line."""
    rows: list[str] = []
    first = 0
    for number, text in enumerate([*read_text(path).splitlines(), ""], start=1):
        line = text.rstrip(" \t-_")  # nothing to the right of the walls
        if "#" in line and _SYMBOLS.keys() >= set(line):
            first = first if rows else number
            rows.append(line)
            continue
        bare = line.lstrip(" -_")
        is_encoded = "#" in line and "|" in line and set(line) <= _ENCODED
        if not is_encoded and bare.startswith("#") and (rows or bare.endswith("#")):
            wrong = next(letter for letter in line if letter not in _SYMBOLS)
            raise ValueError(f"{path}:{number}: {wrong!r} in a row of a level; {EXPECTED}")
        if rows:
            yield _placed(f"{path}:{first}", rows)
            rows = []
        if is_encoded:
            yield _placed(f"{path}:{number}", _decoded(f"{path}:{number}", line))


def _decoded(place: str, line: str) -> list[str]:
    if re.search(r"\d(\||$)", line) or any(int(digits) > _MAX_SIDE for digits in re.findall(r"\d+", line)):
        raise ValueError(f"{place}: expected each number to be at most {_MAX_SIDE} and before what it repeats")
    return re.sub(r"(\d+)(\D)", lambda match: int(match[1]) * match[2], line).strip("|").split("|")


def _placed(place: str, rows: Sequence[str]) -> Placed[SokobanBoard]:
    board = _board(place, rows)
    least = least_pushes(board)
    if least is None:
        raise ValueError(f"{place}: this level cannot be won: a box can get to no goal")
    if least == 0:
        raise ValueError(f"{place}: this level is solved already; expected a box that is on no goal")
    try:
        solution = solve(board, MAX_STEPS, _MAX_STATES)
    except Undecided:
        return Placed(place, board, least)
    if solution is None:
        raise ValueError(f"{place}: this level cannot be won in {MAX_STEPS:,} moves: every way was tried")
    return Placed(place, board, len(solution))


def _board(place: str, rows: Sequence[str]) -> SokobanBoard:
    """Turns everything outside the walls into walls, and cuts off columns that are empty in every row."""
    text = "".join(rows)
    players, boxes, goals = (sum(map(text.count, letters)) for letters in ("@+", "$*", ".+*"))
    if players != 1:
        raise ValueError(f"{place}: {players} players in this level; expected one (@, or + on a goal)")
    if not 0 < boxes == goals:
        raise ValueError(f"{place}: {boxes} boxes and {goals} goals in this level; expected as many, and at least one")
    width = max(map(len, rows))
    if max(width, len(rows)) > _MAX_SIDE:
        raise ValueError(f"{place}: {width} x {len(rows)} cells; expected at most {_MAX_SIDE} x {_MAX_SIDE}")
    cells = [list(row.ljust(width)) for row in rows]
    for y, x in _outside(cells):
        if cells[y][x] not in " -_":
            raise ValueError(f"{place}: the walls have a gap: {cells[y][x]!r} in row {y + 1} is not inside them")
        cells[y][x] = "#"
    left = min(len(row) - len(row.lstrip(" -_")) for row in rows)
    return SokobanBoard(tuple("".join(_SYMBOLS[letter] for letter in row[left:]) for row in cells))


def _outside(cells: Sequence[Sequence[str]]) -> set[tuple[int, int]]:
    """Cells from which the player could leave the level."""
    height = len(cells)
    width = len(cells[0])
    edge = [(y, x) for y in range(height) for x in range(width) if y in (0, height - 1) or x in (0, width - 1)]
    waiting = [(y, x) for y, x in edge if cells[y][x] != "#"]
    found = set(waiting)
    while waiting:
        y, x = waiting.pop()
        for cell in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= cell[0] < height and 0 <= cell[1] < width
            if inside and cell not in found and cells[cell[0]][cell[1]] != "#":
                found.add(cell)
                waiting.append(cell)
    return found
