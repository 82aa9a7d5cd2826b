"""Failed attempts, what they show of the letters, and how they look as text."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from mulligan.models.many_symbols.world import KINDS, UNKNOWN, draw_assignments, shown
from mulligan.models.recipe.boards import (
    ALPHABET,
    CELLS,
    FLOOR_ROLE,
    HOLE_ROLE,
    MAX_STEPS,
    PLAYER_ROLE,
    Bools,
    Ints,
    draw_boards,
    show,
)
from mulligan.models.recipe.tokens import Writer, effect_ids, letter_ids, vocabulary
from mulligan.models.recipe.walks import walk

_TRIES = 4  # for another attempt that failed
# Classes of a cell for the helper head: the four roles, unchanged, entered by the player, and left by the player or a
# hole that the player fell into, with the letter that this shows to be a frozen tile or a hole.
UNCHANGED = 4
NOW_PLAYER = 5
LEFT = 6
NOW_X = LEFT + ALPHABET
CELL_CLASSES = NOW_X + ALPHABET


@dataclass(frozen=True)
class FailedAttempts:
    """Arrays with turns have one column per turn, valid up to `steps`."""

    boards: Ints  # (rows, 3)
    kinds: Ints  # (rows, 9)
    letters: Ints  # (rows, 8)
    players: Ints  # (rows, MAX_STEPS + 1): the player's cell before each turn and at the end
    moves: Ints  # (rows, MAX_STEPS); -1 is an invalid answer
    steps: Ints  # (rows,)
    fell: Bools

    @property
    def rows(self) -> int:
        return len(self.steps)

    @property
    def moved(self) -> Bools:
        return np.asarray((self.players != self.players[:, :1]).any(axis=1))

    def chosen(self, rows: Ints) -> FailedAttempts:
        return FailedAttempts(*(getattr(self, field.name)[rows] for field in fields(self)))

    def board(self, player: Ints) -> Ints:
        """(rows, 9) the letters that are shown while the player is there."""
        return shown(self.letters, self.kinds, show(player, *self.boards.T[1:]))

    def under(self) -> Ints:
        """(rows, 9) the letters that the cells show without the player."""
        holes = self.boards[:, 2]
        roles = np.full((self.rows, CELLS), FLOOR_ROLE)
        roles[(holes[:, None] >> np.arange(CELLS)) & 1 == 1] = HOLE_ROLE
        return shown(self.letters, self.kinds, roles)


def draw_attempts(rng: np.random.Generator, rows: int) -> FailedAttempts:
    """Failed attempts in which something moved: of random play, in part with more optimal moves."""
    drawn, usable = _play(rng, draw_assignments(rng, 2 * rows + 16))
    return drawn.chosen(np.flatnonzero(usable)[:rows])


def others_like(rng: np.random.Generator, attempts: FailedAttempts) -> tuple[FailedAttempts, Bools]:
    """For each attempt another one with its letters, on another board; and whether there is one."""
    drawn, usable = _play(rng, np.concatenate([attempts.letters] * _TRIES))
    usable = usable.reshape(_TRIES, attempts.rows)
    found = np.asarray(usable.any(axis=0))
    return drawn.chosen(usable.argmax(axis=0) * attempts.rows + np.arange(attempts.rows)), found


def _play(rng: np.random.Generator, letters: Ints) -> tuple[FailedAttempts, Bools]:
    """One attempt with each assignment, and whether it failed and moved something."""
    boards = draw_boards(rng, len(letters))
    walked = walk(rng, boards)
    kinds = rng.integers(0, KINDS, (len(letters), CELLS))
    attempts = FailedAttempts(boards, kinds, letters, walked.players, walked.moves, walked.steps, walked.fell)
    return attempts, np.asarray(~walked.won & attempts.moved)


def learned_from(attempts: FailedAttempts) -> Ints:
    """(rows, ALPHABET) what the attempts show for certain: the player, the frozen tiles that it stood on, and the hole
    that it fell into."""
    rows = np.arange(attempts.rows)
    known = np.full((attempts.rows, ALPHABET), UNKNOWN)
    known[rows, attempts.letters[:, 0]] = PLAYER_ROLE
    under = attempts.under()
    for turn in range(MAX_STEPS + 1):
        at = attempts.players[:, turn]
        last_in_hole = attempts.fell & (attempts.steps <= turn)
        there = attempts.steps >= turn
        # The first cell shows its frozen tile once the player has left it; every other cell, before it was entered.
        known[rows[there], under[rows, at][there]] = np.where(last_in_hole, HOLE_ROLE, FLOOR_ROLE)[there]
    return known


def write_trace(writer: Writer, attempts: FailedAttempts, where: Bools | None = None) -> None:
    """Appends the attempts as reflectors see them, with the environment's feedback."""
    here = np.ones(writer.rows, dtype=np.bool_) if where is None else where
    blocked = np.zeros(writer.rows, dtype=np.bool_)
    changes = None
    for turn in range(MAX_STEPS + 1):
        player = attempts.players[:, turn]
        alive = here & (attempts.steps >= turn)
        writer.words("blocked\n", where=alive & blocked)
        ends_in_hole = attempts.fell & (attempts.steps == turn)
        symbols = letter_ids()[attempts.board(player)]
        symbols[ends_in_hole, player[ends_in_hole]] = vocabulary()["X"]
        writer.board(symbols, alive, changes)
        writer.words("\n", where=alive)
        if turn < MAX_STEPS:
            move = attempts.moves[:, turn]
            goes_on = here & (attempts.steps > turn)
            reached = attempts.players[:, turn + 1]
            blocked = reached == player
            changes = _changes(attempts, player, reached)
            valid = goes_on & (move >= 0)
            writer.put(effect_ids()[blocked.astype(np.int64), move], valid)
            writer.words("invalid", where=goes_on & ~valid)
            writer.words("\n", where=goes_on)
    writer.words("fell", "into", "hole", where=here & attempts.fell)
    writer.words("step", "limit", where=here & ~attempts.fell)
    writer.words("\n", where=here)


def _changes(attempts: FailedAttempts, player: Ints, reached: Ints) -> Ints:
    """(rows, 9) the class of each cell, compared with the board before."""
    rows = np.arange(len(player))
    under = attempts.under()
    changes = np.full((len(player), CELLS), UNCHANGED)
    into_hole = (attempts.boards[:, 2] >> reached) & 1 == 1
    changes[rows, reached] = np.where(into_hole, NOW_X + under[rows, reached], NOW_PLAYER)
    changes[rows, player] = LEFT + under[rows, player]
    changes[reached == player] = UNCHANGED
    return changes
