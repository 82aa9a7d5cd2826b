"""Over-turn masking: a sample that a limit cut is neither rewarded nor punished (Mini-o3, arXiv 2509.07969).

    A'_i = M_i · A_i · G / ΣM     M_i = 0 if sample i was truncated, else 1

A is what the base estimator says of all samples, the truncated ones included. The paper divides the group's loss by ΣM
instead of G. Losses are summed over samples of equal weight here, so G / ΣM in the advantage does the same. The shape
is that of the base. A group in which all samples were truncated has zero advantages.

With `aggregation = "token_mean"` a branch is divided by all its tokens, those of truncated samples too, so its loss is
smaller than the paper's by their share. With the other aggregations it is the paper's.

A policy that is trained with few turns is thus not taught to answer early, and uses more turns where it may.
"""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.trainer.advantages import Advantage, Return
from mulligan.trainer.advantages._base import WithBase


class Settings(WithBase):
    """`base`: the estimator whose advantages are masked."""


def estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]:
    return [_masked(group, based) for group, based in zip(groups, settings.of_base(groups), strict=True)]


def _masked(group: Sequence[Return], advantages: Sequence[Advantage]) -> list[Advantage]:
    whole = sum(not sample.truncated for sample in group)
    factor = len(group) / max(whole, 1)
    return [
        _scaled(advantage, 0.0 if sample.truncated else factor)
        for sample, advantage in zip(group, advantages, strict=True)
    ]


def _scaled(advantage: Advantage, factor: float) -> Advantage:
    if isinstance(advantage, tuple):
        return tuple(value * factor for value in advantage)
    return advantage * factor
