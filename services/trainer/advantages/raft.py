"""RAFT: keeps the samples with a positive reward, and has no baseline (arXiv 2304.06767; RAFT++: arXiv 2504.11343).

    A_i = max(r_i, 0)

One number per sample; groups do not matter. A reward that differs from 0 by rounding alone counts as 0
(`mulligan.common.rewards`). With rewards 0 and 1, kept samples have weight 1, as in both papers; with the ratio and the
clipping of the policy-gradient loss this is RAFT++.
"""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.common.plugins import PluginSettings
from mulligan.common.rewards import exceeds
from mulligan.trainer.advantages import Advantage, Return


class Settings(PluginSettings):
    """There are none."""


def estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]:
    return [[sample.reward if exceeds(sample.reward, 0) else 0.0 for sample in group] for group in groups]
