"""The reward of a sample is what it improves on: r_2 - r_1; a base estimator does the rest.

    A = base(r_i - before_i)     before_i: the reward of the attempt that sample i improves on

A sample that improves on nothing keeps its reward. The difference is also taken off the reward of the last turn, so
turns still add up to the reward. The shape is that of the base.

Source: the dynamic improvement reward of WaltzRL (arXiv 2510.08240), without its label terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mulligan.trainer.advantages import Advantage, Return
from mulligan.trainer.advantages._base import WithBase


class Settings(WithBase):
    """`base`: the estimator that is given the improvements as rewards."""


def estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]:
    return settings.of_base([[_improvement(sample) for sample in group] for group in groups])


def _improvement(sample: Return) -> Return:
    before = sample.reward_before
    if before is None:
        return sample
    turns = sample.turn_rewards
    improved = (*turns[:-1], turns[-1] - before) if turns else ()
    return replace(sample, reward=sample.reward - before, turn_rewards=improved)
