"""Whether two groups of runs can be told apart."""

from __future__ import annotations

from proof.staleness import p_value


def test_the_share_of_divisions_that_differ_as_much() -> None:
    assert p_value([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert p_value([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]) == 2 / 20, "this division and its mirror image, of 6 over 3"
    assert p_value([0.0], [1.0, 2.0, 3.0]) == 2 / 4, "0 or 3 alone"
