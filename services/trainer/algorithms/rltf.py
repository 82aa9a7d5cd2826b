"""Reinforcement learning from text feedback with self-distillation (RLTF-SD): arXiv 2602.02482.

    y0 ~ π(·|x) → r0, c                    first turn, and the feedback to it
    y1 ~ π(·|x, y0, c) → r1                second turn, which sees both
    A_i = r1_i − mean(r0_1 … r0_n)         against the *first* turns of the group
    L = RL(y0) + RL(y1) − λ · mean(A_i · log π(y1_i|x))

What the policy does with feedback is taught to the policy without it. With the first turns as the baseline, a second
turn that is no better than a usual first one teaches nothing. As in the paper there is no importance weight: the ratio
π(y1|x)/π(y1|x, y0, c) would be nearly 0 for what is most worth learning.

Reported: above strong baselines in reasoning puzzles, competition mathematics and writing.

Deviations:
1. The feedback c is that of the environment, or with `feedback = "judge"` a critique by `policies.judge`, else by the
   policy itself, which answers the environment's reflection prompt. It is never trained; RLTF-FM, which predicts it, is
   not part of this method.
2. A first turn that solves the task has no second one.
3. RL(y0) and RL(y1) stand for the paper's objective over both turns, each with the advantage in its own group. Only
   summaries of the paper were at hand, with the equation of A; its other settings are not known here.
4. Samples that end in an infrastructure error are left out. Where all first turns did, nothing is taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from math import fsum

from pydantic import Field

from mulligan.common.experience import Sample
from mulligan.trainer.aggregation import aggregate
from mulligan.trainer.algorithms import CUT_TEXTS, READING, Played
from mulligan.trainer.batch import Group, gradients, number_trained, rewards_before, transfer, with_reward
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import fill, reflection_request, trace_of

FIRST = "first"
CRITIQUE = "critique"
SECOND = "second"
DISTILLED = "distilled"


class FeedbackFrom(StrEnum):
    ENVIRONMENT = "environment"
    JUDGE = "judge"


class Settings(AlgorithmSettings):
    name: str = "rltf"
    # Who writes the feedback: "environment" or "judge".
    feedback: FeedbackFrom = FeedbackFrom.ENVIRONMENT
    # λ ≥ 0.
    distillation_weight: float = Field(1.0, ge=0)
    # Weights of the two turns' policy gradients, ≥ 0.
    first_weight: float = Field(1.0, ge=0)
    second_weight: float = Field(1.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return CUT_TEXTS | READING


PLAYS = Played(2, texts=1, copies=1)
REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    first = await member.attempt(FIRST)
    if first.reward is None or member.solves(first):
        return
    parent, feedback = await _feedback(member, first)
    if not parent.outcome.has_reward:
        return
    system = fill(member.prompts.retry, trace=trace_of(first, member.prompts), feedback=feedback)
    second = await member.attempt(SECOND, system=system, parent=parent)
    if second.reward is not None:
        await member.under(DISTILLED, second, like=first)


async def _feedback(member: Member[Settings], first: Sample) -> tuple[Sample, str]:
    """The feedback, and the sample that it stands in."""
    if member.settings.feedback is FeedbackFrom.ENVIRONMENT:
        return first, first.feedback
    request = reflection_request(first, member.prompts, ())
    system = member.prompts.reflection_system
    critique = await member.write(CRITIQUE, request, system=system, parent=first, speaker="judge")
    return critique, critique.text


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """Branches `first` and `second`: policy gradients of the turns. Branch `distilled`: second turns under x."""
    firsts, seconds = with_reward(groups, FIRST), with_reward(groups, SECOND)
    data = gradients(firsts, settings, settings.first_weight / number_trained(firsts), FIRST)
    each = settings.second_weight / number_trained(seconds)
    data += gradients(seconds, settings, each, SECOND, rewards_before(groups))
    targets = [(one, target, group) for group in groups for one in group if (target := one.target(DISTILLED))]
    distilled: list[Datum] = []
    for one, target, group in targets:
        second = one.source(target)
        advantage = (second.reward or 0.0) - baseline(group)
        distilled += transfer(target, second, advantage, settings.distillation_weight / len(targets), DISTILLED)
    return data + aggregate(distilled, settings.aggregation, settings.aggregation_constant)


def baseline(group: Group) -> float:
    """The mean reward of the group's first turns."""
    (firsts,) = with_reward([group], FIRST)
    return fsum(first.reward or 0.0 for first in firsts) / len(firsts)
