"""Attempts at FrozenLake 3×3 by random moves, in part with more optimal ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mulligan.models.recipe.boards import MAX_STEPS, Bools, Ints, tables

INVALID_MOVE = -1


class Walks(NamedTuple):
    """Arrays with turns have one column per turn, valid up to `steps`."""

    players: Ints  # (rows, MAX_STEPS + 1): the player's cell before each turn and at the end
    moves: Ints  # (rows, MAX_STEPS)
    steps: Ints  # (rows,)
    fell: Bools
    won: Bools


def walk(rng: np.random.Generator, boards: Ints) -> Walks:
    """One attempt at each of the boards (rows, 3)."""
    rows = len(boards)
    player, goal, holes = boards.T
    steady = rng.random(rows) * (rng.random(rows) < 0.4) * 0.7
    players = [player]
    moves = []
    steps = np.full(rows, MAX_STEPS)
    fell = np.zeros(rows, np.bool_)
    won = np.zeros(rows, np.bool_)
    for turn in range(MAX_STEPS):
        good = tables().optimal[goal, holes, player]
        appeal = rng.random(good.shape) + (good & (rng.random(rows) < steady)[:, None])
        move = np.where(rng.random(rows) < 0.02, INVALID_MOVE, appeal.argmax(axis=1))
        active = ~fell & ~won
        reached = np.where(active & (move >= 0), tables().next_cell[player, move], player)
        fell |= (holes >> reached) & 1 == 1
        won |= reached == goal
        steps = np.where(active & (fell | won), turn + 1, steps)
        player = reached
        players.append(player)
        moves.append(move)
    return Walks(np.stack(players, axis=1), np.stack(moves, axis=1), steps, fell, won)
