"""Expert iteration: attempts that are good enough are imitated. ReST (arXiv 2308.08998), ReST-EM (arXiv 2312.06585).

    y ~ π(·|x) → r                                        grow (E-step)
    L = −E[1(r passes) log π(y|x)], over all attempts     improve (M-step)

    ReST:     r > τ_i passes. The thresholds τ_1 < … < τ_I take turns, one per step, and begin anew.
    ReST-EM:  r ≥ τ passes, of at most K attempts per task, so that easy tasks do not outweigh hard ones.

There is no baseline and no importance weight; wrong attempts teach nothing. Attempts are played under the prompt that
is deployed, and trained under it.

Published settings, from memory: ReST: one or two grow steps with 4 improve steps each, rewards of a learned model in
[0, 1], thresholds 0, 0.7, 0.8, 0.9, 0.95, 0.99. ReST-EM: PaLM 2, 2 to 3 iterations, 32 (MATH) or 64 (APPS) samples per
problem, K = 10, τ = 1. Reported: MATH rises for two or three iterations; APPS overfits after the first.

Deviations from the papers:
1. Every step grows: ReST imitates the samples of one grow step under each threshold in turn, this samples afresh for
   each. `optimizer_steps` says how often a step's samples are used.
2. The policy goes on from its present weights; ReST-EM's M-step begins from the initial ones each time.
3. The K attempts of a task are its first ones in rollout order; they were drawn alike.
4. L is the mean over all attempts that have a reward, as in ReST's equation. So its size falls with the share that
   passes, and code that averages over what passes has larger steps where little does.
5. Attempts that end in an infrastructure error are left out and counted.
6. What passes is trained at the temperature that it was sampled at (`rollout.temperature`), not at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator

from mulligan.common.experience import Experience, Sample
from mulligan.common.plugins import located
from mulligan.common.rewards import exceeds, reaches
from mulligan.trainer.algorithms import CUT_TEXTS, READING, SUPERVISED, Played
from mulligan.trainer.batch import Group, imitation
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings

FIRST = "first"


class Filter(StrEnum):
    REST = "rest"
    REST_EM = "rest_em"


class Settings(AlgorithmSettings):
    name: str = "expert_iteration"
    # Which attempts pass: by rising thresholds (ReST), or those that solve the task (ReST-EM: `success_threshold`).
    filter: Filter = Filter.REST_EM
    # ReST: τ_1 < … < τ_I, in units of the reward. Step s has threshold s mod I, counted from 0.
    thresholds: tuple[float, ...] = Field((0.0, 0.7, 0.8, 0.9, 0.95, 0.99), min_length=1)
    # K: at most so many attempts of a task pass in a step; 0 is no limit.
    per_task: int = Field(10, ge=0)
    # Weight of the branch.
    first_weight: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _thresholds_rise(self) -> Self:
        if any(later <= earlier for earlier, later in pairwise(self.thresholds)):
            raise located({("thresholds",): f"expected rising numbers; got {list(self.thresholds)}"})
        return self

    @property
    def without_effect(self) -> frozenset[str]:
        return SUPERVISED | CUT_TEXTS | READING | ({"thresholds"} if self.filter is Filter.REST_EM else set())


PLAYS = Played(1)
REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    await member.attempt(FIRST)


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """One branch, `first`: supervised, without advantages and log-probabilities."""
    attempts = sum(one[FIRST].reward is not None for group in groups for one in group)
    kept: list[Sample] = []
    for group in groups:
        passed = [one[FIRST] for one in group if one[FIRST].sequences and passes(one, settings)]
        kept += passed[: settings.per_task or None]
    weight = settings.first_weight / max(attempts, 1)
    return imitation([(sample, sample.temperature) for sample in kept], settings, weight, FIRST)


def passes(one: Experience, settings: Settings) -> bool:
    reward = one[FIRST].reward
    if reward is None:
        return False
    if settings.filter is Filter.REST_EM:
        return reaches(reward, settings.success_threshold)
    return exceeds(reward, settings.thresholds[one.step % len(settings.thresholds)])
