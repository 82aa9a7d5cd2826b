"""Assignments of letters to the player, the goal, three kinds of holes and three kinds of frozen tiles, and what is
known of one.

Knowledge is an array (rows, ALPHABET) with the role of each letter, UNKNOWN where nothing is known.
"""

from __future__ import annotations

import numpy as np

from mulligan.models.recipe.boards import (
    ALPHABET,
    FLOOR_ROLE,
    GOAL_ROLE,
    HOLE_ROLE,
    PLAYER_ROLE,
    Bools,
    Floats,
    Ints,
    tables,
)
from mulligan.models.recipe.tokens import Writer, letter_ids, vocabulary

KINDS = 3  # letters for holes, and for frozen tiles
UNKNOWN = -1
ROLES_OF_LETTERS = np.array([PLAYER_ROLE, GOAL_ROLE, *[HOLE_ROLE] * KINDS, *[FLOOR_ROLE] * KINDS])
_FIRST = np.array([0, 1, 2, 2 + KINDS])  # of a role, in an assignment
FIXED = np.array([0, 1, 2, 4, 6, 3, 5, 7])  # A, B, CEG, DFH: never drawn; the environment's own
_COSTS = {UNKNOWN: 3.0, PLAYER_ROLE: 1.0, GOAL_ROLE: 1.0, HOLE_ROLE: 40.0, FLOOR_ROLE: 1.0}
_SWEEPS = 12


def draw_assignments(rng: np.random.Generator, rows: int) -> Ints:
    """(rows, 8) letters: player, goal, holes, frozen tiles. The order among holes, or frozen tiles, says nothing."""
    letters = rng.random((rows, ALPHABET)).argsort(axis=1)[:, : len(ROLES_OF_LETTERS)]
    wrong = _is_fixed(letters)
    while wrong.any():
        letters[wrong] = rng.random((int(wrong.sum()), ALPHABET)).argsort(axis=1)[:, : len(ROLES_OF_LETTERS)]
        wrong = _is_fixed(letters)
    return letters


def _is_fixed(letters: Ints) -> Bools:
    return np.asarray((roles_of(letters) == roles_of(FIXED[None])).all(axis=1))


def roles_of(letters: Ints) -> Ints:
    """Complete knowledge of these assignments."""
    known = np.full((len(letters), ALPHABET), UNKNOWN)
    np.put_along_axis(known, letters, np.broadcast_to(ROLES_OF_LETTERS, letters.shape), axis=1)
    return known


def shown(letters: Ints, kinds: Ints, roles: Ints) -> Ints:
    """(rows, 9) the letter of each cell. `kinds` (rows, 9) choose among the letters of a hole or frozen tile."""
    several = (roles == HOLE_ROLE) | (roles == FLOOR_ROLE)
    return np.take_along_axis(letters, _FIRST[roles] + np.where(several, kinds, 0), axis=1)


def believed(known: Ints, board: Ints) -> Ints:
    """(rows, 9) the role of each cell, as far as it is known. `board` has the letters."""
    return np.take_along_axis(known, board, axis=1)


def best_moves(roles: Ints) -> Floats:
    """(rows, 4) the probability of each move, from what is known of the cells.

    On the cheapest way to the goal: a frozen tile costs 1, an unknown cell 3, a hole 40. Without a known goal all moves
    that change the board, and are into no known hole, are equally likely; without a known player all moves are.
    """
    rows = np.arange(len(roles))
    next_cell = tables().next_cell
    costs = np.select([roles == role for role in _COSTS], list(_COSTS.values()))
    goals = roles == GOAL_ROLE
    distance = np.where(goals, 0.0, 500.0)
    for _ in range(_SWEEPS):
        onward = costs[:, next_cell] + distance[:, next_cell]
        distance = np.where(goals, 0.0, np.minimum(distance, onward.min(axis=2)))
    players = roles == PLAYER_ROLE
    player = players.argmax(axis=1)
    reached = next_cell[player]  # (rows, 4)
    onward = costs[rows[:, None], reached] + distance[rows[:, None], reached]
    moves = reached != player[:, None]
    good = moves & (onward < np.where(moves, onward, np.inf).min(axis=1, keepdims=True) + 0.5)
    safe = moves & (roles[rows[:, None], reached] != HOLE_ROLE)
    good = np.where(goals.any(axis=1)[:, None], good, np.where(safe.any(axis=1)[:, None], safe, moves))
    good = good | ~players.any(axis=1)[:, None]
    return np.asarray(good / good.sum(axis=1, keepdims=True), dtype=np.float32)


def write_known(writer: Writer, known: Ints, where: Bools | None = None, learn: Floats | None = None) -> None:
    """Appends a legend with a line for each known letter: by role, then by letter. With `learn`, its tokens are trained
    on with these weights."""
    names = ("player", "goal", "hole", "floor")
    started = np.zeros(writer.rows, dtype=np.bool_)
    for role, name in enumerate(names):
        for letter in range(ALPHABET):
            here = (known[:, letter] == role) & (True if where is None else where)
            for token, present in (
                (vocabulary()["\n"], here & started),
                (letter_ids()[letter], here),
                (vocabulary()[name], here),
            ):
                writer.put(token, present)
                if learn is not None:
                    writer.learn_column(learn * present)
            started |= here
