"""RLOO by hand; `tests/reference/test_trl.py` compares it with TRL's RLOOTrainer."""

from __future__ import annotations

import pytest

from mulligan.trainer.advantages.rloo import Settings, estimate
from tests.support.returns import flat, group


def test_groups_that_say_nothing_have_no_advantage() -> None:
    assert estimate([[], group(1.0), group(0.1, 0.1, 0.1)], Settings()) == [[], [0.0], [0.0, 0.0, 0.0]]


def test_one_success_of_three() -> None:
    assert flat(estimate([group(1.0, 0.0, 0.0)], Settings())) == pytest.approx([1.0, -0.5, -0.5])
