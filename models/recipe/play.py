"""Episodes to train on: with a legend the targets are the optimal moves, without one all four moves equally.

The moves that are played are noisy and do not end the episode. Half of the rows get a new board each turn. So every
turn has something to learn.
"""

from __future__ import annotations

import numpy as np

from mulligan.models.recipe.boards import Bools, Floats, Ints, draw_assignments, draw_boards, show, tables
from mulligan.models.recipe.tokens import Batch, Writer, answer_ids, letter_ids, vocabulary


def play_batch(rng: np.random.Generator, rows: int, turns: int, legend_share: float, fresh_share: float = 0.5) -> Batch:
    boards = draw_boards(rng, rows)
    letters = draw_assignments(rng, rows)
    player, goal, holes = boards.T
    told = rng.random(rows) < legend_share
    fresh = rng.random(rows) < fresh_share
    again = ~told & (rng.random(rows) < 0.1)
    writer = Writer(rows)
    writer.words("<|system|>")
    writer.legend(letters, told)
    writer.words("\n", where=told)
    writer.words("wrong", "\n", where=again)
    writer.words("play", "<|end|>")
    steady = (rng.random(rows) * 0.8).astype(np.float32)  # how often this row follows the optimal move
    alive = np.ones(rows, dtype=np.bool_)
    blocked = np.zeros(rows, dtype=np.bool_)
    for _ in range(turns):
        roles = show(player, goal, holes)
        writer.words("<|user|>", where=alive)
        writer.words("blocked\n", where=alive & blocked)
        symbols = letter_ids()[np.take_along_axis(letters, roles, axis=1)]
        writer.board(symbols, alive, np.where(told[:, None], roles, -1))
        writer.words("<|end|>", "<|assistant|>", where=alive)
        good = tables().optimal[goal, holes, player]
        writer.learn(_move_targets(good, told), alive.astype(np.float32))
        move, safe = noisy_move(rng, player, goal, holes, good, steady)
        writer.put(answer_ids()[move], alive)
        writer.words("<|end|>", where=alive)
        writer.learn_column(alive * np.float32(0.1))
        reached = tables().next_cell[player, move]
        blocked = reached == player
        player = reached
        alive = alive & (safe | fresh)
        others = draw_boards(rng, rows).T
        player, goal, holes = (
            np.where(fresh, new, old) for new, old in zip(others, (player, goal, holes), strict=True)
        )
    return writer.batch()


def _move_targets(good: Bools, told: Bools) -> Floats:
    targets = np.zeros((len(good), len(vocabulary().ids)), dtype=np.float32)
    wanted = np.where(told[:, None], good / np.maximum(good.sum(axis=1, keepdims=True), 1), 0.25)
    targets[:, answer_ids()] = wanted
    return targets


def noisy_move(
    rng: np.random.Generator, player: Ints, goal: Ints, holes: Ints, good: Bools, steady: Floats
) -> tuple[Ints, Bools]:
    """Moves that neither fall nor win, if there are any, and whether each is such a move."""
    reached = tables().next_cell[player]  # (rows, 4)
    safe = ((holes[:, None] >> reached) & 1 == 0) & (reached != goal[:, None])
    stays = reached == player[:, None]
    appeal = rng.random(safe.shape) - 2.0 * ~safe - 0.3 * stays
    appeal += np.where((rng.random(len(player)) < steady)[:, None] & good, 1.0, 0.0)
    move = appeal.argmax(axis=1)
    return move, safe[np.arange(len(player)), move]
