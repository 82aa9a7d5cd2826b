"""Negative-aware fine-tuning (NFT): arXiv 2505.18116.

    y_1 … y_n ~ π_old(·|x) → right or wrong
    q = share of right answers, in [.02, .98]
    right y: loss = −log ρ                             ρ = π(token)/π_old(token), token by token
    wrong y: loss = −log max((1 − q·ρ) / (1 − q), 1)   the gradient passes straight through the maximum
    each times (1 − q)

Supervised learning in which wrong answers train an implicit negative policy: π_old = q·π + (1 − q)·π_negative. In the
first optimizer step ρ = 1, and the gradient is that of a policy gradient with advantage (right − q).

Published: n 16, batch 512, learning rate 1e-6, temperature 1, (1 − q) as the weight of a task, mean over tokens.

Deviations:
1. An attempt is right where its reward reaches `success_threshold`.
2. Tasks with only right or only wrong answers are not sampled anew; their gradients are nearly 0.
3. Attempts that end in an infrastructure error count neither as right nor as wrong.
4. The settings of advantages mean nothing: there are no advantages.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mulligan.common.experience import Sample
from mulligan.common.rewards import reaches
from mulligan.trainer.aggregation import Aggregation, aggregate
from mulligan.trainer.algorithms import CUT_TEXTS, READING, SUPERVISED, Played
from mulligan.trainer.batch import Group, data_of, number_trained, with_reward
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.objectives.negative_aware import NegativeAware
from mulligan.trainer.settings import AlgorithmSettings

FIRST = "first"


class Settings(AlgorithmSettings):
    name: str = "nft"
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    # Weight of the branch, ≥ 0.
    first_weight: float = Field(1.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return SUPERVISED | CUT_TEXTS | READING


PLAYS = Played(1, unsampled=1)
REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    await member.attempt(FIRST)


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """One branch, `first`: each attempt as a right or a wrong answer, with its group's share of right ones."""
    attempts = with_reward(groups, FIRST)
    weight = settings.first_weight / number_trained(attempts)
    data: list[Datum] = []
    for group in attempts:
        right = _right(group, settings)
        for attempt, is_right in zip(group, right, strict=True):
            objective = NegativeAware(float(is_right), sum(right) / len(right))
            data += data_of(attempt, attempt.temperature, weight, FIRST, [objective] * len(attempt.sequences))
    return aggregate(data, settings.aggregation, settings.aggregation_constant)


def has_signal(group: Group, settings: Settings) -> bool:
    """Whether there are right and wrong answers."""
    (attempts,) = with_reward([group], FIRST)
    return len(set(_right(attempts, settings))) == 2


def _right(attempts: Sequence[Sample], settings: Settings) -> list[bool]:
    return [reaches(attempt.reward or 0.0, settings.success_threshold) for attempt in attempts]
