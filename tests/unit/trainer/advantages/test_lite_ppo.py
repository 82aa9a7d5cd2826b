"""Lite PPO: against TRL's GRPOTrainer with `scale_rewards="batch"`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from mulligan.trainer.advantages import Return
from mulligan.trainer.advantages.lite_ppo import Settings, estimate
from tests.support.returns import flat, group, groups


@given(groups(min_size=2))
def test_advantages_are_those_of_the_formula(batch: list[list[Return]]) -> None:
    rewards = [torch.tensor([item.reward for item in items], dtype=torch.float64) for items in batch]
    differences = torch.cat([group - group.mean() for group in rewards])
    expected = differences / (torch.cat(rewards).std() + 1e-6)
    assert flat(estimate(batch, Settings())) == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)


def test_batches_that_say_nothing_have_no_advantage() -> None:
    assert estimate([[], group(0.1), group(0.1, 0.1, 0.1)], Settings()) == [[], [0.0], [0.0, 0.0, 0.0]]
    assert estimate([group(1.0), group(0.0)], Settings()) == [[0.0], [0.0]]
    assert estimate([], Settings()) == []


def test_a_group_that_hardly_differs_is_not_blown_up() -> None:
    close, far = estimate([group(0.5, 0.501), group(0.0, 1.0)], Settings())
    assert flat([close]) == pytest.approx([number / 1000 for number in flat([far])])
