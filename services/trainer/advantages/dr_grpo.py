"""Dr. GRPO: the reward against the group's mean, without division by the standard deviation (arXiv 2503.20783).

    A_i = r_i - mean(r_1 … r_G)

One number per sample. Tasks whose rewards hardly differ then weigh no more than others. The paper's loss also divides
by a constant instead of a sequence's length: `Aggregation.CONSTANT`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.common.plugins import PluginSettings
from mulligan.trainer.advantages import Advantage, Return
from mulligan.trainer.advantages._statistics import centred


class Settings(PluginSettings):
    """There are none."""


def estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]:
    return [[*centred([sample.reward for sample in group])] for group in groups]
