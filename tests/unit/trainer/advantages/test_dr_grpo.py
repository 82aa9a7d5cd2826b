"""Dr. GRPO by hand; `tests/reference/test_trl.py` compares it with TRL's `scale_rewards="none"`."""

from __future__ import annotations

from mulligan.trainer.advantages.dr_grpo import Settings, estimate
from tests.support.returns import group


def test_groups_that_say_nothing_have_no_advantage() -> None:
    assert estimate([[], group(1.0), group(0.1, 0.1, 0.1)], Settings()) == [[], [0.0], [0.0, 0.0, 0.0]]


def test_a_hard_task_weighs_no_more_than_another() -> None:
    """GRPO would give the lone success of eight more than twice the advantage of one of four of eight."""
    (hard,), (even,) = (estimate([group(*[1.0] * wins, *[0.0] * (8 - wins))], Settings()) for wins in (1, 4))
    assert (hard[0], even[0]) == (0.875, 0.5)
