from __future__ import annotations

import pytest

from proof.consolidation import paired


def test_the_interval_of_paired_differences() -> None:
    """Differences 0.5, 0, -0.25, 0.25: mean 0.125, deviation sqrt(0.3125 / 3), four boards."""
    found = paired([0.0, 0.5, 0.5, 0.25], [0.5, 0.5, 0.25, 0.5])
    half = 1.959964 * (0.3125 / 3) ** 0.5 / 2
    assert found == {
        "difference": 0.125,
        "lower": pytest.approx(0.125 - half, abs=1e-4),
        "upper": pytest.approx(0.125 + half, abs=1e-4),
    }


def test_boards_that_did_not_change() -> None:
    assert paired([0.5, 1.0], [0.5, 1.0]) == {"difference": 0.0, "lower": 0.0, "upper": 0.0}
