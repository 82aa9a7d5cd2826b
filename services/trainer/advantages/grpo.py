"""GRPO: the reward against the group's, in standard deviations of the group (arXiv 2402.03300, eq. 3).

    A_i = (r_i - mean(r_1 … r_G)) / (std(r_1 … r_G) + ε)

One number per sample. The standard deviation divides by G - 1, as in TRL and verl; ε = 1e-6 is verl's, TRL has 1e-4.
A group of one sample, or with equal rewards, has zero advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.common.plugins import PluginSettings
from mulligan.trainer.advantages import Advantage, Return
from mulligan.trainer.advantages._statistics import EPSILON, centred, deviation


class Settings(PluginSettings):
    """`normalize_by_std` false: r_i - mean."""

    normalize_by_std: bool = True


def estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]:
    return [[*group_advantages([sample.reward for sample in group], settings.normalize_by_std)] for group in groups]


def group_advantages(rewards_G: Sequence[float], normalize_by_std: bool = True) -> list[float]:
    """The advantages of one group."""
    differences = centred(rewards_G)
    if not normalize_by_std:
        return differences
    divisor = deviation(rewards_G) + EPSILON
    return [difference / divisor for difference in differences]
