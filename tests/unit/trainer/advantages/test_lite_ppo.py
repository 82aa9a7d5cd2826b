"""Lite PPO by hand; `tests/reference/test_trl.py` compares it with TRL's `scale_rewards="batch"`."""

from __future__ import annotations

import pytest

from mulligan.trainer.advantages.lite_ppo import Settings, estimate
from tests.support.returns import flat, group


def test_batches_that_say_nothing_have_no_advantage() -> None:
    assert estimate([[], group(0.1), group(0.1, 0.1, 0.1)], Settings()) == [[], [0.0], [0.0, 0.0, 0.0]]
    assert estimate([group(1.0), group(0.0)], Settings()) == [[0.0], [0.0]]
    assert estimate([], Settings()) == []


def test_a_group_that_hardly_differs_is_not_blown_up() -> None:
    close, far = estimate([group(0.5, 0.501), group(0.0, 1.0)], Settings())
    assert flat([close]) == pytest.approx([number / 1000 for number in flat([far])])
