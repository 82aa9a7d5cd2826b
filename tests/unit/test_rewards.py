"""Sums of rewards, and thresholds, whatever the order of the rewards and the arithmetic that made them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.rewards import LARGEST_REWARD, exceeds, is_usable, reaches, total

# How many equal rewards make up the largest sum there is, which solves the task.
PARTS = [1, 3, 6, 7, 10, 49, 100, 1000]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("largest", [1.0, -1.0, 0.7, 100.0, 1e6])
def test_parts_of_a_success_are_a_success(parts: int, largest: float) -> None:
    assert reaches(total([largest / parts] * parts), largest)
    float32 = float(np.float32(largest) / np.float32(parts))
    assert reaches(total([float32] * parts), largest)
    if largest > 0:
        assert not reaches(total([largest / parts] * (parts - 1)), largest)


@given(st.lists(st.floats(-1e6, 1e6), max_size=50), st.randoms())
def test_the_order_of_rewards_is_of_no_account(rewards: list[float], order: object) -> None:
    shuffled = list(rewards)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert total(rewards) == total(shuffled) == float(sum(map(Fraction, rewards)))


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_a_reward_reaches_or_the_threshold_exceeds_it(reward: float, threshold: float) -> None:
    assert reaches(reward, threshold) is not exceeds(threshold, reward)


def test_what_cancels_out_is_no_gain() -> None:
    for rewards in ([0.1, 0.2, -0.3], [0.1] * 3 + [-0.3], [float(np.float32(r)) for r in (0.1, 0.7, -0.8)]):
        assert not exceeds(total(rewards), 0) and reaches(total(rewards), 0)
    assert exceeds(0.001, 0) and not exceeds(-0.001, 0)


def test_what_is_no_finite_sum_is_no_reward() -> None:
    for rewards in ([math.inf, -math.inf], [1e308] * 2, [math.nan], [math.inf]):
        assert not is_usable(total(rewards))
    assert not is_usable(1e200) and not is_usable(-1e200)
    assert is_usable(LARGEST_REWARD) and is_usable(-LARGEST_REWARD) and is_usable(0)
