"""All 3x3 boards, their optimal moves, and the assignments of symbols under which they are shown.

A board is (player cell, goal cell, bit mask of holes). Moves are looked up in tables, so that whole batches are played
at once. The environment's test boards are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from mulligan.env.envs.frozenlake.boards import FROZEN, GOAL, HOLE, PLAYER, LakeBoard
from mulligan.models.build import MOVES

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

SIDE = 3
CELLS = 9
MAX_STEPS = 8
PLAYER_ROLE, GOAL_ROLE, HOLE_ROLE, FLOOR_ROLE = range(4)
ALPHABET = 12  # symbols are drawn from the letters A–L…
FIXED = (0, 1, 2, 3)  # …but never this assignment, which reinforcement learning must find out
_FAR = 99
_FROZEN_SHARES = np.linspace(0.6, 0.85, 26)


@dataclass(frozen=True)
class Tables:
    next_cell: Ints  # (cell, move); the cell itself at a wall
    optimal: Bools  # (goal, holes, cell, move): does the move shorten the way?
    boards: Ints  # (board, 3): player, goal, holes of every board to train on
    chances: npt.NDArray[np.float64]  # the probability of each board in the environment


@cache
def tables() -> Tables:
    next_cell = np.array([[_neighbour(cell, move) for move in range(4)] for cell in range(CELLS)])
    masks = np.arange(2**CELLS)
    is_hole = (masks[:, None] >> np.arange(CELLS)) & 1 == 1
    distance = np.full((CELLS, len(masks), CELLS), _FAR)
    for goal in range(CELLS):
        distance[goal, :, goal] = 0
    for _ in range(CELLS):
        shorter = distance[:, :, next_cell].min(axis=3) + 1
        distance = np.minimum(distance, np.where(is_hole[None], _FAR, shorter))
    distance = np.where(is_hole[None], _FAR, distance)
    optimal = distance[:, :, next_cell] == distance[..., None] - 1
    boards = []
    chances = []
    for player in range(CELLS):
        for goal in range(CELLS):
            for holes in range(2**CELLS):
                taken = (holes >> player) & 1 or (holes >> goal) & 1 or player == goal
                if not taken and distance[goal, holes, player] <= MAX_STEPS and not _is_test(player, goal, holes):
                    boards.append((player, goal, holes))
                    count = bin(holes).count("1")
                    chances.append(float(np.mean(_FROZEN_SHARES ** (7 - count) * (1 - _FROZEN_SHARES) ** count)))
    weights = np.array(chances)
    return Tables(next_cell, optimal, np.array(boards), weights / weights.sum())


def _neighbour(cell: int, move: int) -> int:
    dy, dx = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}[MOVES[move]]
    y = cell // SIDE + dy
    x = cell % SIDE + dx
    return y * SIDE + x if 0 <= y < SIDE and 0 <= x < SIDE else cell


def _is_test(player: int, goal: int, holes: int) -> bool:
    cells = [HOLE if (holes >> cell) & 1 else FROZEN for cell in range(CELLS)]
    cells[player] = PLAYER
    cells[goal] = GOAL
    return LakeBoard(tuple("".join(cells[row : row + SIDE]) for row in range(0, CELLS, SIDE))).is_test


def draw_boards(rng: np.random.Generator, number: int) -> Ints:
    table = tables()
    return table.boards[rng.choice(len(table.boards), size=number, p=table.chances)]


def draw_assignments(rng: np.random.Generator, number: int) -> Ints:
    """(number, 4) letters for player, goal, hole, floor: uniform over all assignments except the fixed one."""
    letters = rng.random((number, ALPHABET)).argsort(axis=1)[:, :4]
    wrong = is_fixed(letters)
    while wrong.any():
        letters[wrong] = rng.random((int(wrong.sum()), ALPHABET)).argsort(axis=1)[:, :4]
        wrong = is_fixed(letters)
    return letters


def is_fixed(letters: Ints) -> Bools:
    return np.asarray((letters == np.array(FIXED)).all(axis=1))


def show(player: Ints, goal: Ints, holes: Ints) -> Ints:
    """(number, 9) the role of each cell."""
    roles = np.full((len(player), CELLS), FLOOR_ROLE)
    roles[(holes[:, None] >> np.arange(CELLS)) & 1 == 1] = HOLE_ROLE
    rows = np.arange(len(player))
    roles[rows, goal] = GOAL_ROLE
    roles[rows, player] = PLAYER_ROLE
    return roles
