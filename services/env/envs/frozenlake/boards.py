"""FrozenLake boards and their shortest path.

A board is written in the canonical letters A–D: player `A`, goal `B`, hole `C`, frozen tile `D`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from mulligan.env.grid import MOVES, is_test

PLAYER = "A"
GOAL = "B"
HOLE = "C"
FROZEN = "D"


@dataclass(frozen=True, slots=True)
class LakeBoard:
    """The board at the start: rows of canonical letters, all of the same length."""

    rows: tuple[str, ...]

    @property
    def is_test(self) -> bool:
        return is_test(self.rows)

    def find(self, letter: str) -> tuple[int, int]:
        for y, row in enumerate(self.rows):
            x = row.find(letter)
            if x >= 0:
                return y, x
        raise ValueError(f"no {letter} on the board")

    def shortest_path(self) -> int | None:
        """The number of moves from the player to the goal around the holes; None if there is no way."""
        height = len(self.rows)
        width = len(self.rows[0])
        start = self.find(PLAYER)
        distances = {start: 0}
        queue = deque([start])
        while queue:
            y, x = queue.popleft()
            if self.rows[y][x] == GOAL:
                return distances[y, x]
            for dy, dx in MOVES.values():
                cell = (y + dy, x + dx)
                inside = 0 <= cell[0] < height and 0 <= cell[1] < width
                if inside and cell not in distances and self.rows[cell[0]][cell[1]] != HOLE:
                    distances[cell] = distances[y, x] + 1
                    queue.append(cell)
        return None
