"""Sums of rewards, and thresholds, whatever the order of the rewards and the arithmetic that made them."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mulligan.common.rewards import LARGEST_REWARD, differ, exceeds, is_usable, reaches, read_reward, total

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


class Foreign:
    """Raises whatever is asked of it."""

    def __float__(self) -> float:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("reward", "number"),
    [
        *((1, 1.0), (True, 1.0), (0.25, 0.25), (-1e12, -1e12), (Decimal("0.5"), 0.5), (Fraction(1, 4), 0.25)),
        *((np.float32(0.5), 0.5), (np.int64(2), 2.0), (np.bool_(True), 1.0), (np.array(3.0), 3.0)),
        *((torch.tensor(2.0), 2.0), (torch.tensor(1, dtype=torch.int8), 1.0)),
    ],
    ids=repr,
)
def test_numbers_of_any_library_are_rewards(reward: object, number: float) -> None:
    assert read_reward(reward) == number and type(read_reward(reward)) is float


@pytest.mark.parametrize(
    ("reward", "named"),
    [
        *((None, "None"), ("1.0", "'1.0'"), (b"1", "b'1'"), (1j, "1j"), ([1.0], "[1.0]"), ({}, "{}")),
        *((math.nan, "nan"), (math.inf, "inf"), (1e200, "1e+200"), (-1e200, "-1e+200"), (10**400, "1000")),
        *((10**5000, "a int"), (Decimal("sNaN"), "sNaN"), (np.float32("nan"), "nan"), (np.zeros(2), "array([0., 0.])")),
        *((torch.zeros(2), "tensor([0., 0.])"), (Foreign(), "a Foreign"), ("x" * 10_000, "characters left out")),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 99 else "",
)
def test_what_is_no_reward_is_named(reward: object, named: str) -> None:
    with pytest.raises(ValueError, match="is not a number from -1e") as caught:
        read_reward(reward)
    assert named in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ((), False),
        ((None, None), False),
        ((1.0, None), False),
        ((1.0, 1.0), False),
        ((0.3, 0.1 + 0.2), False),
        ((0.0, None, 0.5), True),
        ((-1.0, 1.0), True),
    ],
)
def test_rewards_differ_by_more_than_rounding(rewards: tuple[float | None, ...], expected: bool) -> None:
    assert differ(rewards) is expected
