"""The draw of the entry that is left out."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from mulligan.memory.draw import draw

ENTRIES = ("a", "b", "c", "d")
COUNT = 20_000


def within_five_deviations(seen: int, probability: float, count: int = COUNT) -> bool:
    return abs(seen - count * probability) <= 5 * math.sqrt(count * probability * (1 - probability))


@pytest.mark.parametrize("holdout", [0.25, 0.9, 1.0])
@pytest.mark.parametrize("entries", [ENTRIES, ENTRIES[:3], ENTRIES[:1]])
def test_each_entry_is_left_out_equally_often(holdout: float, entries: tuple[str, ...]) -> None:
    seen = Counter(draw(3, f"attempt-{number}", entries, holdout) for number in range(COUNT))
    assert within_five_deviations(seen.pop(None, 0), 1 - holdout)
    assert set(seen) == set(range(len(entries)))
    assert all(within_five_deviations(times, holdout / len(entries)) for times in seen.values())


def test_draws_of_other_seeds_keys_and_entries_are_independent() -> None:
    """Each pair of answers is as frequent as the product of its probabilities."""
    probabilities = dict.fromkeys(range(4), 0.2) | {None: 0.2}  # holdout 0.8
    others = [(4, "{}", ENTRIES), (3, "{}'", ENTRIES), (3, "{}", ("a", "b", "c", "e"))]
    for seed, key, entries in others:
        pairs = Counter(
            (draw(3, str(number), ENTRIES, 0.8), draw(seed, key.format(number), entries, 0.8))
            for number in range(COUNT)
        )
        for first, second in ((first, second) for first in probabilities for second in probabilities):
            assert within_five_deviations(pairs[first, second], probabilities[first] * probabilities[second])


def test_the_answer_is_the_same_on_every_machine() -> None:
    answers = [draw(-7, f"köy {number}", ENTRIES, 0.6) for number in range(12)]
    assert answers == [None, None, 0, 3, 0, None, 3, 1, 2, 1, None, 3]


def test_parts_are_not_taken_for_each_other() -> None:
    first = [draw(1, f"{number}a", ("b", "c"), 1.0) for number in range(64)]
    assert first != [draw(1, f"{number}", ("ab", "c"), 1.0) for number in range(64)]
    assert first != [draw(1, f"{number}a", ("bc", ""), 1.0) for number in range(64)]


def test_nothing_is_left_out_without_entries_or_holdout() -> None:
    assert {draw(0, str(number), (), 1.0) for number in range(100)} == {None}
    assert {draw(0, str(number), ENTRIES, 0.0) for number in range(100)} == {None}
    assert None not in {draw(0, str(number), ENTRIES, 1.0) for number in range(100)}


@pytest.mark.parametrize("holdout", [-0.1, 1.1, math.nan])
def test_a_holdout_outside_of_its_range_is_refused(holdout: float) -> None:
    with pytest.raises(ValueError, match=f"holdout {holdout}, not a number from 0 to 1"):
        draw(0, "attempt", ENTRIES, holdout)
