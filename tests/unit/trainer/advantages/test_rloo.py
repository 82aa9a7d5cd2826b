"""RLOO: against the mean of the others, with the sample itself taken out (TRL's RLOOTrainer)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from mulligan.trainer.advantages import Return
from mulligan.trainer.advantages.rloo import Settings, estimate
from tests.support.returns import flat, group, groups


@given(groups(min_size=2))
def test_advantages_are_those_of_the_formula(batch: list[list[Return]]) -> None:
    expected = []
    for items in batch:
        rewards = torch.tensor([item.reward for item in items], dtype=torch.float64)
        for place, reward in enumerate(rewards):
            others = torch.cat([rewards[:place], rewards[place + 1 :]])
            expected.append(float(reward - others.mean()))
    assert flat(estimate(batch, Settings())) == pytest.approx(expected, abs=1e-6)


def test_groups_that_say_nothing_have_no_advantage() -> None:
    assert estimate([[], group(1.0), group(0.1, 0.1, 0.1)], Settings()) == [[], [0.0], [0.0, 0.0, 0.0]]


def test_one_success_of_three() -> None:
    assert flat(estimate([group(1.0, 0.0, 0.0)], Settings())) == pytest.approx([1.0, -0.5, -0.5])
