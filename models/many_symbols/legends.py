"""Legends that follow from a failed attempt and from the memory, which may have legends or another attempt.

What the attempt shows is certain. The memory says the rest where the attempt does not contradict it; of two texts the
first one counts. A goal that neither knows is guessed among the letters that stand once on the board and are not known
to be something else. Other letters that nobody knows are left out.
"""

from __future__ import annotations

import numpy as np

from mulligan.models.many_symbols.attempts import FailedAttempts, draw_attempts, learned_from, others_like, write_trace
from mulligan.models.many_symbols.play import forgotten
from mulligan.models.many_symbols.world import UNKNOWN, roles_of, write_known
from mulligan.models.recipe.boards import ALPHABET, GOAL_ROLE, PLAYER_ROLE, Bools, Floats, Ints
from mulligan.models.recipe.tokens import Batch, Writer, letter_ids, vocabulary

_NOTHING, _LEGEND, _TWO_LEGENDS, _ATTEMPT = range(4)
_SHARES = (0.25, 0.5, 0.1, 0.15)


def legend_batch(rng: np.random.Generator, rows: int) -> Batch:
    attempts = draw_attempts(rng, rows)
    rows = attempts.rows
    kind = rng.choice(len(_SHARES), rows, p=_SHARES)
    legends = [_remembered(rng, attempts.letters) for _ in range(2)]
    others, found = others_like(rng, attempts)
    legend = (kind == _LEGEND) | (kind == _TWO_LEGENDS)
    second = kind == _TWO_LEGENDS
    other = (kind == _ATTEMPT) & found
    memory = np.where(legend[:, None], legends[0], UNKNOWN)
    memory = np.where(second[:, None] & (memory == UNKNOWN), legends[1], memory)
    memory = np.where(other[:, None], learned_from(others), memory)
    writer = Writer(rows)
    writer.words("<|system|>", "explain", "<|end|>", "<|user|>")
    write_trace(writer, attempts)
    write_known(writer, legends[0], legend)
    writer.words("\n", "\n", where=second)
    write_known(writer, legends[1], second)
    write_trace(writer, others, other)
    writer.words("nothing", where=~legend & ~other)
    writer.words("<|end|>", "<|assistant|>")
    _write_answer(rng, writer, merged(attempts, memory), goal_chances(attempts, memory))
    return writer.batch()


def merged(attempts: FailedAttempts, memory: Ints) -> Ints:
    """(rows, ALPHABET) what the attempt shows and, where it shows nothing, what the memory says, but for the goal."""
    shown = learned_from(attempts)
    recalled = np.where((memory == GOAL_ROLE) | (memory == PLAYER_ROLE), UNKNOWN, memory)
    return np.where(shown != UNKNOWN, shown, recalled)


def goal_chances(attempts: FailedAttempts, memory: Ints) -> Floats:
    """(rows, ALPHABET) the probability of each letter for the goal."""
    first = attempts.board(attempts.players[:, 0])
    counts = (first[:, :, None] == np.arange(ALPHABET)).sum(axis=1)
    shown = learned_from(attempts)
    single = (counts == 1) & (shown == UNKNOWN)
    recalled = (memory == GOAL_ROLE) & single
    open_ = single & ((memory == UNKNOWN) | (memory == GOAL_ROLE))
    possible = np.where(recalled.any(axis=1, keepdims=True), recalled, open_)
    possible = np.where(possible.any(axis=1, keepdims=True), possible, single)
    return np.asarray(possible / possible.sum(axis=1, keepdims=True), dtype=np.float32)


def _remembered(rng: np.random.Generator, letters: Ints) -> Ints:
    """Legends of these assignments, complete or not: seven in ten right, the others with letters mixed up."""
    known = forgotten(rng, roles_of(letters))
    order = rng.random(known.shape).argsort(axis=1)
    mixed = np.take_along_axis(known, np.where(known == UNKNOWN, np.arange(ALPHABET), order), axis=1)
    wrong = rng.random(len(known)) < 0.3
    known = np.where(wrong[:, None], mixed, known)
    empty = ~(known != UNKNOWN).any(axis=1)
    return np.where(empty[:, None], roles_of(letters), known)


def _write_answer(rng: np.random.Generator, writer: Writer, known: Ints, chances: Floats) -> None:
    everywhere = np.ones(writer.rows, dtype=np.float32)
    some = everywhere * np.float32(0.1)
    rows = np.arange(writer.rows)
    goal = np.where(chances > 0, rng.random(chances.shape), -1.0).argmax(axis=1)
    player = (known == PLAYER_ROLE).argmax(axis=1)
    rest = known.copy()
    rest[rows, player] = UNKNOWN
    rest[rows, goal] = UNKNOWN
    writer.words("<prompt>")
    writer.learn_column(some)
    writer.put(letter_ids()[player])
    writer.learn_column(everywhere)
    for word in ("player", "\n"):
        writer.words(word)
        writer.learn_column(some)
    targets = np.zeros((writer.rows, len(vocabulary().ids)), dtype=np.float32)
    targets[:, letter_ids()] = chances
    writer.learn(targets, everywhere)
    writer.put(letter_ids()[goal])
    writer.words("goal")
    writer.learn_column(some)
    followed: Bools = (rest != UNKNOWN).any(axis=1)
    writer.words("\n", where=followed)
    writer.learn_column(everywhere)
    write_known(writer, rest, learn=everywhere)
    writer.words("</prompt>")
    writer.learn_column(everywhere)
    writer.words("<|end|>")
    writer.learn_column(some)
