"""RAFT: against a filter and a weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from mulligan.trainer.advantages import Return
from mulligan.trainer.advantages.raft import Settings, estimate
from tests.support.returns import flat, group, groups


@given(groups())
def test_advantages_are_those_of_the_formula(batch: list[list[Return]]) -> None:
    rewards = torch.tensor([item.reward for items in batch for item in items], dtype=torch.float64)
    assert flat(estimate(batch, Settings())) == pytest.approx(torch.relu(rewards).tolist(), abs=2e-6)


def test_failures_are_left_out_and_nothing_else_is_scaled() -> None:
    batch = [[], group(1.0), group(1.0, 1.0), group(-1.0, 0.0, 2.0)]
    assert estimate(batch, Settings()) == [[], [1.0], [1.0, 1.0], [0.0, 0.0, 2.0]]


def test_what_differs_from_zero_by_rounding_is_zero() -> None:
    assert estimate([group(0.1 + 0.2 - 0.3)], Settings()) == [[0.0]]
