"""Failed attempts, and the legends that follow from them.

Each line of a legend is learned as a distribution. What the trace shows is certain. What it leaves open is taken from
the memory if that fits; otherwise all possibilities are equally likely.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mulligan.models.build import ROLES
from mulligan.models.recipe.boards import (
    ALPHABET,
    CELLS,
    FIXED,
    FLOOR_ROLE,
    GOAL_ROLE,
    HOLE_ROLE,
    MAX_STEPS,
    PLAYER_ROLE,
    Bools,
    Floats,
    Ints,
    draw_assignments,
    draw_boards,
    is_fixed,
    show,
    tables,
)
from mulligan.models.recipe.tokens import Batch, Writer, answer_ids, effect_ids, letter_ids, vocabulary
from mulligan.models.recipe.walks import walk

# Classes of a cell for the helper head, after the four roles: unchanged, entered by the player, left by the player
# (with the player's letter), a hole that the player fell into (with its letter).
UNCHANGED = 4
NOW_PLAYER = 5
LEFT = 6
NOW_X = LEFT + ALPHABET
CELL_CLASSES = NOW_X + ALPHABET


@dataclass(frozen=True)
class FailedAttempts:
    """Failed attempts. Arrays with turns have one column per turn, valid up to `steps`."""

    boards: Ints  # (rows, 3)
    letters: Ints  # (rows, 4)
    players: Ints  # (rows, MAX_STEPS + 1): the player's cell before each turn and at the end
    moves: Ints  # (rows, MAX_STEPS); -1 is an invalid answer
    steps: Ints  # (rows,)
    fell: Bools

    @property
    def moved(self) -> Bools:
        return np.asarray((self.players != self.players[:, :1]).any(axis=1))


@dataclass(frozen=True)
class RememberedLegends:
    letters: Ints  # (rows, 4)
    filled: Bools


def draw_attempts(rng: np.random.Generator, rows: int) -> FailedAttempts:
    """Failed attempts of random play, in part with more optimal moves."""
    drawn = 2 * rows + 16
    boards = draw_boards(rng, drawn)
    letters = draw_assignments(rng, drawn)
    walked = walk(rng, boards)
    failed = np.flatnonzero(~walked.won)[:rows]
    return FailedAttempts(
        boards[failed],
        letters[failed],
        walked.players[failed],
        walked.moves[failed],
        walked.steps[failed],
        walked.fell[failed],
    )


def draw_memory(rng: np.random.Generator, letters: Ints) -> RememberedLegends:
    """For each row no legend, the right one, or one with letters replaced or swapped."""
    rows = len(letters)
    kind = rng.random(rows)
    spoiled = np.where(rng.random(letters.shape) < rng.random(rows)[:, None], draw_assignments(rng, rows), letters)
    shuffled = np.take_along_axis(letters, rng.random(letters.shape).argsort(axis=1), axis=1)
    remembered = np.where((kind < 0.7)[:, None], letters, np.where((kind < 0.88)[:, None], spoiled, shuffled))
    return RememberedLegends(remembered, (kind > 0.4) & ~is_fixed(remembered))


def write_legends(rng: np.random.Generator, attempts: FailedAttempts, memory: RememberedLegends) -> tuple[Ints, Floats]:
    """(rows, 4) letters, sampled line by line, and their (rows, 4, letters) distributions."""
    rows = len(attempts.steps)
    lines = np.arange(len(attempts.steps))
    first = np.take_along_axis(attempts.letters, show(*attempts.boards.T), axis=1)
    counts = (first[:, :, None] == np.arange(ALPHABET)).sum(axis=1)
    present = counts > 0
    single = counts == 1
    known = np.zeros((rows, 4), dtype=np.bool_)
    known[:, PLAYER_ROLE] = known[:, FLOOR_ROLE] = attempts.moved
    known[:, HOLE_ROLE] = attempts.fell
    certain = known[:, :, None] & (attempts.letters[:, :, None] == np.arange(ALPHABET))
    chosen = np.zeros((rows, 4), dtype=np.int64)
    chances = np.zeros((rows, 4, ALPHABET), dtype=np.float32)
    used = np.zeros((rows, ALPHABET), dtype=np.bool_)
    for role in range(4):
        elsewhere = used | np.delete(certain, role, axis=1).any(axis=1)
        if role == PLAYER_ROLE:
            possible = single & _could_be_blocked(attempts, first)
        elif role == GOAL_ROLE:
            possible = single & ~elsewhere
        else:
            possible = _hole_or_floor(role, present & ~elsewhere, elsewhere | present, attempts.moved)
        possible = np.where(known[:, role, None], certain[:, role], possible)
        recalled = (np.arange(ALPHABET) == memory.letters[:, role, None]) & memory.filled[:, None]
        fits = possible & recalled
        possible = np.where(fits.any(axis=1, keepdims=True), fits, possible)
        chances[:, role] = possible / np.maximum(possible.sum(axis=1, keepdims=True), 1)
        chosen[:, role] = np.where(possible, rng.random(possible.shape), -1.0).argmax(axis=1)
        used[lines, chosen[:, role]] = True
    return chosen, chances


def _hole_or_floor(role: int, left: Bools, taken: Bools, moved: Bools) -> Bools:
    """The possible letters of a hole or floor. `left` are letters on the board that no other line explains. A single
    one is a hole if the floor is known, otherwise floor. Without any, every letter that is not `taken` is possible."""
    number = left.sum(axis=1)
    seen = (number > 1) | ((number == 1) & (moved | (role == FLOOR_ROLE)))
    return np.where(seen[:, None], left, ~taken)


def _could_be_blocked(attempts: FailedAttempts, first: Ints) -> Bools:
    """Letters on cells where every move of the attempt would have hit a wall. Used if nothing moved."""
    walls = tables().next_cell == np.arange(CELLS)[:, None]  # (cell, move)
    valid = attempts.moves >= 0
    blocked = (walls[:, attempts.moves] | ~valid[None]).all(axis=2).T  # (rows, cell)
    return np.asarray(((first[:, :, None] == np.arange(ALPHABET)) & blocked[:, :, None]).any(axis=1))


def reflection_batch(rng: np.random.Generator, rows: int) -> Batch:
    attempts = draw_attempts(rng, rows)
    memory = draw_memory(rng, attempts.letters)
    legends, chances = write_legends(rng, attempts, memory)
    # Rows that could show the fixed assignment are not trained on.
    could_be_fixed: Bools = np.all(chances[:, range(4), FIXED] > 0, axis=1)
    weight = np.asarray(~could_be_fixed, dtype=np.float32)
    writer = Writer(len(attempts.steps))
    writer.words("<|system|>", "explain", "<|end|>", "<|user|>")
    write_trace(writer, attempts)
    writer.legend(memory.letters, memory.filled)
    writer.words("nothing", where=~memory.filled)
    writer.words("<|end|>", "<|assistant|>")
    _write_answer(writer, legends, chances, weight)
    return writer.batch()


def retry_batch(rng: np.random.Generator, rows: int) -> Batch:
    """Retries with a raw attempt in the system prompt. It is no legend, so all first moves are equally likely."""
    attempts = draw_attempts(rng, rows)
    writer = Writer(len(attempts.steps))
    writer.words("<|system|>")
    write_trace(writer, attempts)
    writer.words("play", "<|end|>", "<|user|>")
    symbols = np.take_along_axis(attempts.letters, show(*attempts.boards.T), axis=1)
    writer.board(letter_ids()[symbols])
    writer.words("<|end|>", "<|assistant|>")
    targets = np.zeros((writer.rows, len(vocabulary().ids)), dtype=np.float32)
    targets[:, answer_ids()] = 0.25
    writer.learn(targets, np.ones(writer.rows, dtype=np.float32))
    return writer.batch()


def _write_answer(writer: Writer, legends: Ints, chances: Floats, weight: Floats) -> None:
    writer.words("<prompt>")
    writer.learn_column(weight * np.float32(0.1))
    for role, name in enumerate(ROLES):
        targets = np.zeros((writer.rows, len(vocabulary().ids)), dtype=np.float32)
        targets[:, letter_ids()] = chances[:, role]
        writer.learn(targets, weight)
        writer.put(letter_ids()[legends[:, role]])
        for word in (name, "\n") if role < 3 else (name, "</prompt>", "<|end|>"):
            writer.words(word)
            writer.learn_column(weight * np.float32(0.1))


def _changes(attempts: FailedAttempts, player: Ints, reached: Ints) -> Ints:
    """(rows, 9) the class of each cell, compared with the board before."""
    rows = np.arange(len(player))
    changes = np.full((len(player), CELLS), UNCHANGED)
    into_hole = (attempts.boards[:, 2] >> reached) & 1 == 1
    hole_was = NOW_X + attempts.letters[:, HOLE_ROLE]
    changes[rows, reached] = np.where(into_hole, hole_was, NOW_PLAYER)
    changes[rows, player] = LEFT + attempts.letters[:, PLAYER_ROLE]
    changes[reached == player] = UNCHANGED
    return changes


def write_trace(writer: Writer, attempts: FailedAttempts) -> None:
    player, goal, holes = attempts.boards.T
    blocked = np.zeros(writer.rows, dtype=np.bool_)
    changes = None
    for turn in range(MAX_STEPS + 1):
        player = attempts.players[:, turn]
        alive = attempts.steps >= turn
        writer.words("blocked\n", where=alive & blocked)
        ends_in_hole = attempts.fell & (attempts.steps == turn)
        symbols = letter_ids()[np.take_along_axis(attempts.letters, show(player, goal, holes), axis=1)]
        symbols[ends_in_hole, player[ends_in_hole]] = vocabulary()["X"]
        writer.board(symbols, alive, changes)
        writer.words("\n", where=alive)
        if turn < MAX_STEPS:
            move = attempts.moves[:, turn]
            goes_on = attempts.steps > turn
            reached = attempts.players[:, turn + 1]
            blocked = reached == player
            changes = _changes(attempts, player, reached)
            valid = goes_on & (move >= 0)
            writer.put(effect_ids()[blocked.astype(np.int64), move], valid)
            writer.words("invalid", where=goes_on & ~valid)
            writer.words("\n", where=goes_on)
    writer.words("fell", "into", "hole", where=attempts.fell)
    writer.words("step", "limit", where=~attempts.fell)
    writer.words("\n")
