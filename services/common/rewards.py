"""Sums of rewards and comparisons with thresholds.

Binary fractions round: 0.1 added ten times gives 0.9999999999999999. So a sum is rounded once, at its end, and every
comparison of a reward with a threshold uses `reaches` or `exceeds`, which treat numbers as equal that differ by
rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from mulligan.common.text import bounded

_ROUNDING = 1e-6  # relative, and absolute near 0: environments often compute in float32, which has seven digits
_SHOWN = 100  # characters of an invalid reward that an error shows
LARGEST_REWARD = 1e12  # absolute value, per attempt; the square of a larger one overflows float32


def total(rewards: Iterable[float]) -> float:
    """The exact sum, rounded once; NaN if it is not finite."""
    try:
        return math.fsum(rewards)
    except (OverflowError, ValueError):  # overflow; ∞ − ∞
        return math.nan


def reaches(reward: float, threshold: float) -> bool:
    """Whether the reward is at least the threshold, rounding aside."""
    return reward >= threshold or _are_equal(reward, threshold)


def exceeds(reward: float, threshold: float) -> bool:
    """Whether the reward is above the threshold, rounding aside."""
    return reward > threshold and not _are_equal(reward, threshold)


def differ(rewards: Iterable[float | None]) -> bool:
    """Whether there are two different ones, rounding aside. None counts for nothing."""
    found = [reward for reward in rewards if reward is not None]
    return bool(found) and exceeds(max(found), min(found))


def is_usable(reward: float) -> bool:
    """Whether an attempt with this reward can be compared with others."""
    return abs(reward) <= LARGEST_REWARD  # also false for NaN


class BadReward(ValueError):
    """A reward that is no number, not finite or too large. The message quotes it, and is complete."""


def read_reward(reward: object) -> float:
    """Returns an environment's reward, a Python number or a scalar of a library, as a float. Raises BadReward."""
    try:
        number = math.nan if isinstance(reward, str | bytes | bytearray) else float(reward)  # type: ignore[arg-type]  # so it raises
    except Exception:  # noqa: BLE001 - foreign objects raise anything
        number = math.nan
    if not is_usable(number):
        raise BadReward(f"reward {_quoted(reward)} is not a number from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}")
    return number


def _quoted(value: object) -> str:
    try:
        return bounded(repr(value), _SHOWN)
    except Exception:  # noqa: BLE001 - foreign objects raise anything
        return f"a {type(value).__name__}"


def _are_equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
