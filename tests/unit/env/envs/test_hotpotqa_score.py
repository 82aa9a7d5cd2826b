"""HotpotQA's official scores, and the rewards made of them."""

from __future__ import annotations

import pytest

from mulligan.env.answers import boxed, normalize
from mulligan.env.envs.hotpotqa.score import Method, exact_match, f1, score


# Computed by hand after hotpot_evaluate_v1.py.
@pytest.mark.parametrize(
    ("answer", "gold", "em", "expected_f1"),
    [
        ("The Eiffel Tower", "eiffel tower.", True, 1.0),
        ("an apple a day", "apple day", True, 1.0),
        ("U.S.A.", "usa", True, 1.0),
        ("Barack Obama", "Barack Hussein Obama", False, 0.8),  # 2 of 2, 2 of 3
        ("Obama Barack", "Barack Obama", False, 1.0),
        ("Paris, France", "Paris", False, 2 / 3),
        ("in the city of Paris", "Paris", False, 0.4),  # in city of paris: 1 of 4, 1 of 1
        ("the the", "a", True, 0.0),  # nothing is left of either: equal, and no word in common
        ("new new york", "new york new york", False, 2 * 1.0 * 0.75 / 1.75),
        ("yes", "Yes!", True, 1.0),
        ("yes indeed", "yes", False, 0.0),
        ("no", "no way", False, 0.0),
        ("noanswer", "no answer", False, 0.0),
        ("1,800", "1800", True, 1.0),
        ("another", "other", False, 0.0),  # articles are words, not letters
    ],
)
def test_official_scores(answer: str, gold: str, em: bool, expected_f1: float) -> None:
    assert exact_match(answer, gold) is em
    assert f1(answer, gold) == pytest.approx(expected_f1)


def test_normalisation_is_the_official_one() -> None:
    assert normalize("  The  Lion, the-Witch & a Wardrobe! ") == "lion thewitch wardrobe"
    assert normalize("Ünder “quotes”") == "ünder “quotes”"  # ASCII punctuation alone


@pytest.mark.parametrize(
    ("answer", "gold", "reward", "method"),
    [
        ("Sorn", "the Sorn", 1.0, Method.EXACT_MATCH),
        ("River Sorn", "Sorn", 2 / 3, Method.F1),
        ("a b c d e sorn", "sorn", 2 / 6, Method.F1),  # an article is dropped: 1 of 5, 1 of 1
        ("b c d e f sorn", "sorn", 0.0, Method.F1),  # 2/7 is below 0.3
        ("Bel", "Sorn", 0.0, Method.F1),
        ("Sorn Upper", "Upper Sorn", 1.0, Method.F1),
        (None, "Sorn", 0.0, Method.NO_ANSWER),
        ("  ", "Sorn", 0.0, Method.NO_ANSWER),
    ],
)
def test_rewards(answer: str | None, gold: str, reward: float, method: Method) -> None:
    result = score(answer, gold)
    assert result.reward == pytest.approx(reward) and result.method is method


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{Sorn}", "Sorn"),
        (r"It is \boxed{Bel}, no: \boxed{ Sorn }.", "Sorn"),
        (r"$\boxed{\text{the Sorn}}$", "the Sorn"),
        (r"\boxed{a {b {c}} d}", "a {b {c}} d"),
        (r"\boxed{Sorn} and \boxed{cut off", "Sorn"),
        (r"<think>\boxed{Bel}</think>Sorn", None),
        (r"<think>\boxed{Bel}</think>\boxed{Sorn}", "Sorn"),
        (r"\boxed{}", ""),
        ("boxed{Sorn}", None),
        ("**Sorn**", None),
        (r"\boxed{" + "x" * 2000 + "}", None),
        (r"\boxed{" * 100_000, None),
    ],
)
def test_the_answer_is_the_last_complete_box(text: str, expected: str | None) -> None:
    assert boxed(text) == expected
