"""REINFORCE++: the reward, normalised over all sampled tokens of the batch (arXiv 2501.03262).

    A_i = (R_i - mean(R)) / √(var(R) + 1e-8)     R_i = r_i, or with `baseline` r_i - mean of its group

One number per sample. Mean and variance are over the batch, and count a sample as often as it has sampled tokens, as in
verl (`compute_reinforce_plus_plus_outcome_advantage` and `…_baseline_…`). The paper's KL term is not in the reward here
but in the loss (`kl_coefficient`), and its discount is 1. Without `baseline`, groups do not matter and may have one
sample. With it, a group of one has R = 0. A batch in which nothing differs has zero advantages.
"""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.common.plugins import PluginSettings
from mulligan.trainer.advantages import Advantage, Return
from mulligan.trainer.advantages._statistics import centred, whitened


class Settings(PluginSettings):
    """`baseline`: REINFORCE++-baseline, for several samples per task."""

    baseline: bool = False


def estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]:
    rewards = [[sample.reward for sample in group] for group in groups]
    values = [value for group in rewards for value in (centred(group) if settings.baseline else group)]
    numbers = iter(whitened(values, [sample.tokens for group in groups for sample in group]))
    return [[next(numbers) for _ in group] for group in groups]
