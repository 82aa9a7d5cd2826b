"""What a mix takes for a near-duplicate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.memory.retrieval.mix import SIMILARITY, similarity

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
    assert (similarity(one, other) >= SIMILARITY) is near
    assert similarity(one, other) == similarity(other, one)


@given(st.text(), st.text())
def test_a_text_is_like_itself_and_never_more_than_that(one: str, other: str) -> None:
    assert similarity(one, one) == 1 >= similarity(one, other) >= 0
