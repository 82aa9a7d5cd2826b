"""Sokoban boards and their shortest solution.

A board is written in the canonical letters A–E: player `A` (`a` on a goal), box `B` (`b` on a goal), goal `C`,
floor `D`, wall `E`. Its cells are numbered row by row; a state of the game is the player's cell and those of the boxes.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from mulligan.env.grid import MOVES, is_test

PLAYER = "A"
PLAYER_ON_GOAL = "a"
BOX = "B"
BOX_ON_GOAL = "b"
GOAL = "C"
FLOOR = "D"
WALL = "E"
LETTERS = PLAYER + PLAYER_ON_GOAL + BOX + BOX_ON_GOAL + GOAL + FLOOR + WALL
_DEAD = 1_000_000  # more than any number of moves
State = tuple[int, frozenset[int]]  # the player's cell, the boxes' cells


@dataclass(frozen=True, slots=True)
class SokobanBoard:
    """The board at the start: rows of canonical letters, all of the same length, with a border of walls."""

    rows: tuple[str, ...]

    @property
    def is_test(self) -> bool:
        return is_test(self.rows)

    @property
    def width(self) -> int:
        return len(self.rows[0])

    def cells(self, letters: str) -> frozenset[int]:
        """Numbers of all cells that hold one of the letters."""
        return frozenset(index for index, letter in enumerate("".join(self.rows)) if letter in letters)

    @property
    def start(self) -> State:
        (player,) = self.cells(PLAYER + PLAYER_ON_GOAL)
        return player, self.cells(BOX + BOX_ON_GOAL)

    @property
    def goals(self) -> frozenset[int]:
        return self.cells(GOAL + PLAYER_ON_GOAL + BOX_ON_GOAL)

    @property
    def walls(self) -> frozenset[int]:
        return self.cells(WALL)


def move(state: State, offset: int, walls: frozenset[int]) -> State | None:
    """The state after a move by `offset` cells, which may push a box; None if the move has no effect."""
    player, boxes = state
    to = player + offset
    if to in walls:
        return None
    if to not in boxes:
        return to, boxes
    pushed_to = to + offset
    if pushed_to in walls or pushed_to in boxes:
        return None
    return to, boxes - {to} | {pushed_to}


def offsets(width: int) -> dict[str, int]:
    """For each move, the difference in the cell's number."""
    return {name: dy * width + dx for name, (dy, dx) in MOVES.items()}


class Undecided(Exception):
    """The search has reached its limit of states."""


def solve(board: SokobanBoard, max_moves: int, max_states: int | None = None) -> tuple[str, ...] | None:
    """A shortest solution, or None if there is none with at most `max_moves` moves. Raises Undecided.

    Breadth-first search. It skips states that cannot be won with the remaining moves: a push moves one box by one cell.
    """
    goals = board.goals
    walls = board.walls
    steps = offsets(board.width)
    pushes = _pushes(board)
    came_from: dict[State, tuple[State, str] | None] = {board.start: None}
    queue = deque([(board.start, 0)])
    while queue:
        state, moves = queue.popleft()
        if state[1] == goals:
            return _path(came_from, state)
        if max_states is not None and len(came_from) > max_states:
            raise Undecided
        for name, offset in steps.items():
            after = move(state, offset, walls)
            if after is None or after in came_from:
                continue
            if moves + 1 + sum(pushes[box] for box in after[1]) <= max_moves:
                came_from[after] = (state, name)
                queue.append((after, moves + 1))
    return None


def least_pushes(board: SokobanBoard) -> int | None:
    """A lower bound of the pushes, and so of the moves, of a solution; None if some box cannot reach a goal."""
    pushes = _pushes(board)
    least = sum(pushes[box] for box in board.start[1])
    return least if least < _DEAD else None


def _pushes(board: SokobanBoard) -> list[int]:
    """For each cell, the pushes that a single box needs from there to the nearest goal; `_DEAD` if it cannot reach one.
    Computed backwards from the goals: a box on a cell came from a neighbouring cell, and the player who pushed it stood
    one cell further away."""
    walls = board.walls
    pushes = [_DEAD] * (board.width * len(board.rows))
    queue = deque(board.goals)
    for goal in board.goals:
        pushes[goal] = 0
    while queue:
        cell = queue.popleft()
        for offset in offsets(board.width).values():
            before = cell - offset
            if before not in walls and before - offset not in walls and pushes[before] == _DEAD:
                pushes[before] = pushes[cell] + 1
                queue.append(before)
    return pushes


def _path(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    names: list[str] = []
    while (step := came_from[state]) is not None:
        state, name = step
        names.append(name)
    return tuple(reversed(names))


def draw_board(rng: random.Random, side_min: int, side_max: int, boxes: int, wall_share: float) -> SokobanBoard:
    """Draws one board: a room in which each inner cell is a wall with probability `wall_share`, with as many goals as
    boxes. No box starts on a goal. The board may be unsolvable, and may belong to either split."""
    side = rng.randint(side_min, side_max)
    inner = [y * side + x for y in range(1, side - 1) for x in range(1, side - 1)]
    placed = rng.sample(inner, 2 * boxes + 1)
    cells = [WALL] * (side * side)
    for cell in inner:
        cells[cell] = WALL if wall_share and rng.random() < wall_share else FLOOR
    for cell, letter in zip(placed, PLAYER + BOX * boxes + GOAL * boxes, strict=True):
        cells[cell] = letter
    return SokobanBoard(tuple("".join(cells[y * side : (y + 1) * side]) for y in range(side)))
