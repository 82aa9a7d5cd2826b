from __future__ import annotations

import numpy as np

from mulligan.models.build import build_tokenizer
from mulligan.models.many_symbols.attempts import draw_attempts, learned_from, others_like, write_trace
from mulligan.models.many_symbols.legends import goal_chances, legend_batch, merged
from mulligan.models.many_symbols.measure import SYMBOLS, environment, legend
from mulligan.models.many_symbols.play import play_batch, trace_batch
from mulligan.models.many_symbols.world import (
    FIXED,
    UNKNOWN,
    best_moves,
    draw_assignments,
    roles_of,
    write_known,
)
from mulligan.models.recipe.boards import ALPHABET, GOAL_ROLE, HOLE_ROLE, draw_boards, show, tables
from mulligan.models.recipe.tokens import ABSENT, Writer

LETTERS = "ABCDEFGHIJKL"


def first_row(writer: Writer) -> str:
    return str(build_tokenizer().decode([column[0] for column in writer.columns if column[0] != ABSENT]))


def test_the_environments_assignment_is_never_drawn() -> None:
    by_letter = dict(
        zip(SYMBOLS.replace(" ", ""), roles_of(FIXED[None])[0][[*map(LETTERS.index, "ABCEGDFH")]], strict=True)
    )
    assert by_letter == {"A": 0, "B": 1, "C": 2, "E": 2, "G": 2, "D": 3, "F": 3, "H": 3}
    drawn = roles_of(draw_assignments(np.random.default_rng(0), 2_000))
    assert not (drawn == roles_of(FIXED[None])).all(axis=1).any()


def test_an_attempt_shows_only_what_is_true_and_not_the_goal() -> None:
    attempts = draw_attempts(np.random.default_rng(1), 500)
    known = learned_from(attempts)
    truth = roles_of(attempts.letters)
    assert np.array_equal(known[known != UNKNOWN], truth[known != UNKNOWN])
    assert not (known == GOAL_ROLE).any()
    assert ((known == HOLE_ROLE).sum(axis=1) == attempts.fell).all(), "of the holes, the one that ended the attempt"
    share = (known != UNKNOWN).sum() / (truth != UNKNOWN).sum()
    assert 0.3 < share < 0.6, "part of the letters, not all"


def test_the_memory_says_what_the_attempt_does_not_show() -> None:
    attempts = draw_attempts(np.random.default_rng(2), 300)
    truth = roles_of(attempts.letters)
    known = merged(attempts, truth)
    expected = np.where(truth == GOAL_ROLE, UNKNOWN, truth)
    assert np.array_equal(known, expected)
    rows = np.arange(attempts.rows)
    assert (goal_chances(attempts, truth)[rows, attempts.letters[:, 1]] == 1).all()
    nothing = np.full_like(truth, UNKNOWN)
    guesses = goal_chances(attempts, nothing)
    assert (guesses[rows, attempts.letters[:, 1]] > 0).all()
    assert guesses[rows, attempts.letters[:, 1]].mean() < 0.7, "without a memory the goal is a guess"


def test_a_wrong_memory_counts_where_nothing_contradicts_it() -> None:
    attempts = draw_attempts(np.random.default_rng(3), 300)
    wrong = np.where(roles_of(attempts.letters) == UNKNOWN, UNKNOWN, HOLE_ROLE)
    shown = learned_from(attempts)
    known = merged(attempts, wrong)
    assert np.array_equal(known[shown != UNKNOWN], shown[shown != UNKNOWN])
    assert (known[(shown == UNKNOWN) & (wrong == HOLE_ROLE)] == HOLE_ROLE).all()


def test_with_whole_knowledge_the_best_moves_are_the_shortest_way() -> None:
    boards = draw_boards(np.random.default_rng(4), 500)
    roles = show(*boards.T)
    player, goal, holes = boards.T
    assert np.array_equal(best_moves(roles) > 0, tables().optimal[goal, holes, player])


def test_without_knowledge_all_moves_are_equal() -> None:
    assert (best_moves(np.full((3, 9), UNKNOWN)) == 0.25).all()


def test_other_attempts_have_the_same_letters() -> None:
    attempts = draw_attempts(np.random.default_rng(5), 100)
    others, found = others_like(np.random.default_rng(6), attempts)
    assert found.mean() > 0.8
    assert np.array_equal(others.letters, attempts.letters)
    assert not np.array_equal(others.boards, attempts.boards)


def test_legends_are_written_as_the_environment_is_played_with_them() -> None:
    writer = Writer(1)
    writer.words("<|system|>")
    write_known(writer, roles_of(FIXED[None]))
    text = first_row(writer)
    assert text.removeprefix("<|system|>").strip() == legend()


def test_traces_are_written_as_reflectors_see_them() -> None:
    attempts = draw_attempts(np.random.default_rng(7), 20)
    writer = Writer(20)
    write_trace(writer, attempts)
    text = first_row(writer)
    lines = text.strip().split("\n")
    assert lines[-1] in ("fell into hole", "step limit")
    first = [cell for line in lines[:3] for cell in line.split()]
    assert first == [LETTERS[letter] for letter in attempts.board(attempts.players[:, 0])[0]]
    assert environment().info.prompts.trace_turn == "{observation}\n{action}\n"


def test_every_batch_has_targets_that_are_distributions() -> None:
    rng = np.random.default_rng(8)
    for batch in (play_batch(rng, 20, 4), trace_batch(rng, 20, 2), legend_batch(rng, 40)):
        assert len(batch.at) == len(batch.targets) == len(batch.weights) > 0
        assert np.allclose(batch.targets.sum(axis=1), 1)
        assert (batch.tokens[batch.at[:, 0], batch.at[:, 1]] >= 0).all()
        assert (batch.cell_classes < 6 + 2 * ALPHABET).all()
