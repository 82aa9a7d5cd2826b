"""Episodes to train on: with a legend, complete or not, the targets are the best moves by what it says.

The moves that are played are noisy and do not end the episode. Half of the rows get a new board each turn.
"""

from __future__ import annotations

import numpy as np

from mulligan.models.many_symbols.attempts import draw_attempts, learned_from, write_trace
from mulligan.models.many_symbols.world import (
    KINDS,
    UNKNOWN,
    believed,
    best_moves,
    draw_assignments,
    roles_of,
    shown,
    write_known,
)
from mulligan.models.recipe.boards import CELLS, Floats, Ints, draw_boards, show, tables
from mulligan.models.recipe.play import noisy_move
from mulligan.models.recipe.tokens import Batch, Writer, answer_ids, letter_ids, vocabulary


def play_batch(rng: np.random.Generator, rows: int, turns: int, legend_share: float = 0.85) -> Batch:
    """Conversations with a legend in the system prompt, or without one."""
    letters = draw_assignments(rng, rows)
    told = rng.random(rows) < legend_share
    known = np.where(told[:, None], forgotten(rng, roles_of(letters)), UNKNOWN)
    told &= (known != UNKNOWN).any(axis=1)
    again = ~told & (rng.random(rows) < 0.1)
    writer = Writer(rows)
    writer.words("<|system|>")
    write_known(writer, known, told)
    writer.words("\n", where=told)
    writer.words("wrong", "\n", where=again)
    writer.words("play", "<|end|>")
    return _played(rng, writer, letters, known, turns)


def trace_batch(rng: np.random.Generator, rows: int, turns: int) -> Batch:
    """Conversations with an earlier attempt on another board in the system prompt."""
    attempts = draw_attempts(rng, rows)
    rows = attempts.rows
    writer = Writer(rows)
    writer.words("<|system|>")
    write_trace(writer, attempts)
    writer.words("play", "<|end|>")
    return _played(rng, writer, attempts.letters, learned_from(attempts), turns)


def forgotten(rng: np.random.Generator, known: Ints) -> Ints:
    """Half of the rows whole; of the others each letter with a probability of 0.2 to 1."""
    rows = len(known)
    share = np.where(rng.random(rows) < 0.5, 1.0, 0.2 + 0.8 * rng.random(rows))
    return np.where(rng.random(known.shape) < share[:, None], known, UNKNOWN)


def _played(rng: np.random.Generator, writer: Writer, letters: Ints, known: Ints, turns: int) -> Batch:
    rows = writer.rows
    boards = draw_boards(rng, rows)
    kinds = rng.integers(0, KINDS, (rows, CELLS))
    player, goal, holes = boards.T
    fresh = rng.random(rows) < 0.5
    steady = (rng.random(rows) * 0.8).astype(np.float32)
    alive = np.ones(rows, dtype=np.bool_)
    blocked = np.zeros(rows, dtype=np.bool_)
    any_known = (known != UNKNOWN).any(axis=1)
    for _ in range(turns):
        board = shown(letters, kinds, show(player, goal, holes))
        roles = believed(known, board)
        writer.words("<|user|>", where=alive)
        writer.words("blocked\n", where=alive & blocked)
        writer.board(letter_ids()[board], alive, np.where(any_known[:, None], roles, UNKNOWN))
        writer.words("<|end|>", "<|assistant|>", where=alive)
        writer.learn(_move_targets(best_moves(roles)), alive.astype(np.float32))
        good = tables().optimal[goal, holes, player]
        move, safe = noisy_move(rng, player, goal, holes, good, steady)
        writer.put(answer_ids()[move], alive)
        writer.words("<|end|>", where=alive)
        writer.learn_column(alive * np.float32(0.1))
        reached = tables().next_cell[player, move]
        blocked = reached == player
        player = reached
        alive = alive & (safe | fresh)
        others = draw_boards(rng, rows).T
        kinds = np.where(fresh[:, None], rng.integers(0, KINDS, (rows, CELLS)), kinds)
        player, goal, holes = (
            np.where(fresh, new, old) for new, old in zip(others, (player, goal, holes), strict=True)
        )
    return writer.batch()


def _move_targets(chances: Floats) -> Floats:
    targets = np.zeros((len(chances), len(vocabulary().ids)), dtype=np.float32)
    targets[:, answer_ids()] = chances
    return targets
