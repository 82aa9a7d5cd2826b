"""Lite PPO: the mean of the group, the standard deviation of the batch (arXiv 2508.08221).

    A_i = (r_i - mean of its group) / (std of all rewards of the batch + ε)

One number per sample. The standard deviation divides by n - 1; ε = 1e-6. TRL's `scale_rewards="batch"` is the same
with ε = 1e-4. A group with nearly equal rewards is not blown up as in GRPO. The paper combines it with the mean over
tokens: `Aggregation.TOKEN_MEAN`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.common.plugins import PluginSettings
from mulligan.trainer.advantages import Advantage, Return
from mulligan.trainer.advantages._statistics import EPSILON, centred, deviation


class Settings(PluginSettings):
    """There are none."""


def estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]:
    divisor = deviation([sample.reward for group in groups for sample in group]) + EPSILON
    return [[value / divisor for value in centred([sample.reward for sample in group])] for group in groups]
