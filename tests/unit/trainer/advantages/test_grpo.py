"""GRPO: against the formula of verl's `compute_grpo_outcome_advantage`; TRL: `tests/reference/test_trl.py`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from mulligan.trainer.advantages import Return
from mulligan.trainer.advantages.grpo import Settings, estimate
from tests.support.returns import flat, group, groups


def reference(rewards: torch.Tensor, normalize: bool) -> torch.Tensor:
    difference = rewards - rewards.mean()
    return difference / (rewards.std() + 1e-6) if normalize else difference


@given(groups(min_size=2))
@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_are_those_of_the_formula(normalize: bool, batch: list[list[Return]]) -> None:
    rewards = [torch.tensor([item.reward for item in items], dtype=torch.float64) for items in batch]
    expected = torch.cat([reference(group, normalize) for group in rewards])
    found = flat(estimate(batch, Settings(normalize_by_std=normalize)))
    assert found == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)


def test_groups_that_say_nothing_have_no_advantage() -> None:
    assert estimate([[], group(1.0), group(0.1, 0.1, 0.1)], Settings()) == [[], [0.0], [0.0, 0.0, 0.0]]
    assert estimate([], Settings()) == []


def test_numbers_are_exact() -> None:
    """Runs of other versions continue with the same bits."""
    high, low = 0.75 / (0.5 + 1e-6), -0.25 / (0.5 + 1e-6)
    assert estimate([group(1.0, 0.0, 0.0, 0.0)], Settings()) == [[high, low, low, low]]
    assert estimate([group(1.0, 0.0, 0.0, 0.0)], Settings(normalize_by_std=False)) == [[0.75, -0.25, -0.25, -0.25]]
