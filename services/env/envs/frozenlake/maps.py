"""FrozenLake's maps, as Gymnasium has them: rows of S (start), F (frozen), H (hole) and G (goal).

In a text file, maps are separated by empty lines or comments (`# …`, `; …`). A JSON file holds a map (a list of rows),
a list of maps, or maps under their names, as Gymnasium's `MAPS`; a TOML file holds maps under their names. There, a map
may also be a text of several lines, or lists of letters.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from mulligan.env.envs.frozenlake.boards import FROZEN, GOAL, HOLE, PLAYER, LakeBoard
from mulligan.env.grid_files import Placed, read_text

_SYMBOLS = {"S": PLAYER, "F": FROZEN, "H": HOLE, "G": GOAL}
_MAX_SIDE = 64
EXPECTED = "expected S (start), F (frozen), H (hole) and G (goal)"


def read_maps(path: Path) -> Iterator[Placed[LakeBoard]]:
    """Reads maps. Raises ValueError, which names the line or the map."""
    readers = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix.lower() not in readers:
        yield from _read_text(path)
        return
    try:
        content = readers[path.suffix.lower()](read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: not {path.suffix[1:].upper()}: {error}") from error
    yield from _read_value(str(path), content)


def _read_text(path: Path) -> Iterator[Placed[LakeBoard]]:
    rows: list[str] = []
    first = 0
    for number, line in enumerate([*read_text(path).splitlines(), ""], start=1):
        row = line.strip()
        if row and not row.startswith(("#", ";")):
            first = first if rows else number
            _check_row(f"{path}:{number}", row, rows)
            rows.append(row)
        elif rows:
            yield _placed(f"{path}:{first}", rows)
            rows = []


def _read_value(place: str, value: object) -> Iterator[Placed[LakeBoard]]:
    if isinstance(value, str) and "\n" in value:
        value = value.split()
    elif isinstance(value, list) and value and all(map(_is_cells, value)):
        value = ["".join(row) for row in value]
    if isinstance(value, list) and value and all(isinstance(row, str) and "\n" not in row for row in value):
        rows: list[str] = []
        for number, row in enumerate(value, start=1):
            _check_row(f"{place}: row {number}", row, rows)
            rows.append(row)
        yield _placed(place, rows)
    elif isinstance(value, list) and value:
        for number, item in enumerate(value, start=1):
            yield from _read_value(f"{place}: map {number}", item)
    elif isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _read_value(f"{place}: {name}", item)
    else:
        raise ValueError(f'{place}: expected maps, each a list of rows such as ["SF", "HG"], not {str(value)[:40]!r}')


def _is_cells(row: object) -> bool:
    return isinstance(row, list) and len(row) > 0 and all(isinstance(cell, str) and len(cell) == 1 for cell in row)


def _check_row(place: str, row: str, before: Sequence[str]) -> None:
    wrong = next((letter for letter in row if letter not in _SYMBOLS), None)
    if wrong is not None or not row:
        raise ValueError(f"{place}: {wrong or row!r} in a row of a map; {EXPECTED}")
    if before and len(row) != len(before[0]):
        raise ValueError(f"{place}: a row of {len(row)} cells; expected {len(before[0])}, as in the map's first row")


def _placed(place: str, rows: Sequence[str]) -> Placed[LakeBoard]:
    starts, goals = (sum(row.count(letter) for row in rows) for letter in "SG")
    if starts != 1 or goals < 1:
        raise ValueError(f"{place}: {starts} starts and {goals} goals; expected one S and at least one G")
    if max(len(rows), len(rows[0])) > _MAX_SIDE:
        raise ValueError(f"{place}: {len(rows[0])} x {len(rows)} cells; expected at most {_MAX_SIDE} x {_MAX_SIDE}")
    board = LakeBoard(tuple("".join(map(_SYMBOLS.__getitem__, row)) for row in rows))
    least = board.shortest_path()
    if least is None:
        raise ValueError(f"{place}: there is no way from S to G past the holes")
    return Placed(place, board, least)
