"""Improvement: against the formula of the base, on r2 - r1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from mulligan.trainer.advantages import Return
from mulligan.trainer.advantages.improvement import Settings, estimate
from tests.support.returns import flat, groups, sample


@given(groups(min_size=2))
def test_advantages_are_those_of_the_formula(batch: list[list[Return]]) -> None:
    expected = []
    for items in batch:
        after = torch.tensor([item.reward for item in items], dtype=torch.float64)
        gains = after - torch.tensor([item.reward_before or 0.0 for item in items], dtype=torch.float64)
        expected.extend(((gains - gains.mean()) / (gains.std() + 1e-6)).tolist())
    assert flat(estimate(batch, Settings())) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_success_that_was_one_before_is_no_gain() -> None:
    batch = [[sample(1.0, before=0.0), sample(1.0, before=1.0), sample(0.0, before=1.0), sample(0.0, before=0.0)]]
    assert estimate(batch, Settings(base="dr_grpo")) == [[1.0, 0.0, -1.0, 0.0]]
    assert estimate([[sample(1.0), sample(0.0)]], Settings(base="dr_grpo")) == [[0.5, -0.5]]
    assert estimate([[], [sample(1.0, before=0.0)]], Settings()) == [[], [0.0]]


def test_turns_still_add_up() -> None:
    settings = Settings(base="turn_level", base_settings={"whiten": False})
    better = Return(1.0, (0.5, 0.5), (1, 1), reward_before=0.0)
    worse = Return(1.0, (0.5, 0.5), (1, 1), reward_before=1.0)
    assert estimate([[better, worse]], settings) == [[(0.5, 0.5), (-0.5, -0.5)]]
    none = Return(1.0, (), (), reward_before=1.0)
    assert estimate([[none]], settings) == [[()]]
