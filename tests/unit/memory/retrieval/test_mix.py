"""What a mix takes for a near-duplicate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.memory.retrieval.mix import SIMILARITY, pairs, similarity

LONG = "walk around every hole in the ice and count your steps before you reach the goal at the end"


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        (LONG, LONG.upper() + "!", True),
        (LONG, LONG.replace("goal", "exit"), True),
        ("A player\nB goal\nC hole", "A goal\nB hole\nC player", False),
        ("go left, not right", "go right, not left", False),
        ("left", "Left.", True),
        ("left", "right", False),
        ("", "", True),
        ("?", "!", False),
        (LONG, "walk around every hole", False),
    ],
)
def test_near_duplicates_say_the_same_in_the_same_order(one: str, other: str, *, near: bool) -> None:
    left, right = pairs(one), pairs(other)
    assert (similarity(left, right) >= SIMILARITY) is near
    assert similarity(left, right) == similarity(right, left)


@given(st.text(), st.text())
def test_a_text_is_like_itself_and_never_more_than_that(one: str, other: str) -> None:
    left, right = pairs(one), pairs(other)
    assert similarity(left, left) == 1 >= similarity(left, right) >= 0
