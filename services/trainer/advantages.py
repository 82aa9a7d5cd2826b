"""Advantages of every branch of ERL: pure functions on plain numbers.

A group holds the attempts of one task and one role. First and second attempts are never normalised together (ERL: arXiv
2602.13949; GRPO: arXiv 2402.03300, eq. 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt

EPSILON = 1e-6  # verl's, on which the paper's reference code is built


def group_advantages(rewards_G: Sequence[float], normalize_by_std: bool = True) -> list[float]:
    """GRPO: (r - mean) / (std + ε) over one group, or r - mean. The standard deviation divides by n - 1, as in TRL and
    verl.

    A group of one sample, or with equal rewards, has zero advantage.
    """
    if len(rewards_G) < 2 or len(set(rewards_G)) == 1:
        return [0.0] * len(rewards_G)
    mean = fsum(rewards_G) / len(rewards_G)
    if not normalize_by_std:
        return [reward - mean for reward in rewards_G]
    std = sqrt(fsum((reward - mean) ** 2 for reward in rewards_G) / (len(rewards_G) - 1))
    return [(reward - mean) / (std + EPSILON) for reward in rewards_G]
