"""Dr. GRPO: against TRL's `scale_rewards="none"`, over all groups at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from mulligan.trainer.advantages import Return
from mulligan.trainer.advantages.dr_grpo import Settings, estimate
from tests.support.returns import flat, group, groups


@given(groups())
def test_advantages_are_those_of_the_formula(batch: list[list[Return]]) -> None:
    rewards = torch.tensor([item.reward for items in batch for item in items], dtype=torch.float64)
    index = torch.tensor([number for number, items in enumerate(batch) for _ in items])
    sums = torch.zeros(len(batch), dtype=torch.float64).index_add(0, index, rewards)
    expected = rewards - (sums / torch.bincount(index, minlength=len(batch)))[index]
    assert flat(estimate(batch, Settings())) == pytest.approx(expected.tolist(), abs=1e-6)


def test_groups_that_say_nothing_have_no_advantage() -> None:
    assert estimate([[], group(1.0), group(0.1, 0.1, 0.1)], Settings()) == [[], [0.0], [0.0, 0.0, 0.0]]


def test_a_hard_task_weighs_no_more_than_another() -> None:
    """GRPO would give the lone success of eight more than twice the advantage of one of four of eight."""
    (hard,), (even,) = (estimate([group(*[1.0] * wins, *[0.0] * (8 - wins))], Settings()) for wins in (1, 4))
    assert (hard[0], even[0]) == (0.875, 0.5)
