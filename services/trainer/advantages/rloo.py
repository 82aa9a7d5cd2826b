"""RLOO: the reward against the mean of the others in the group (arXiv 2402.14740).

    A_i = r_i - mean(r_j, j ≠ i) = G / (G - 1) · (r_i - mean(r_1 … r_G))

One number per sample. The baseline does not depend on the sample, so the gradient is unbiased. A group of one sample
has zero advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.common.plugins import PluginSettings
from mulligan.trainer.advantages import Advantage, Return
from mulligan.trainer.advantages._statistics import centred


class Settings(PluginSettings):
    """There are none."""


def estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]:
    return [_leave_one_out([sample.reward for sample in group]) for group in groups]


def _leave_one_out(rewards_G: Sequence[float]) -> list[Advantage]:
    factor = len(rewards_G) / max(len(rewards_G) - 1, 1)
    return [factor * difference for difference in centred(rewards_G)]
