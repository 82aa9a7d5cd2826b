"""Unary Feedback as Observation (UFO): arXiv 2507.14295.

    for t = 0 … k − 1, in one conversation:
        a_t ~ π(·|x, a_0, f, …, a_{t−1}, f)     a try; f is always the same sentence, such as "try again"
        solved: t* = t, done
    R = γ^{t*} · 1[solved] − λ (1 − E/T) − η · invalid      T tries, E distinct ones
    L = RL(a_0 … a_{T−1}): the conversation is one sequence with one reward R

A try's answer is all its actions. With γ < 1 early tries are worth more, with λ > 0 different ones.

Published settings: 5 tries, Qwen2.5-3B-Instruct, PPO with GAE(1, 1), 200 steps of 8 prompts with 16 rollouts each,
entropy coefficient 1e-3. Code (github.com/lichengliu03/unary-feedback): γ = 1/2, "Incorrect. Please think again."; in
games whose episodes have several turns, a sentence and the first observation. Reported: up to 14 % more successes
within five tries than single-turn training, and as many in the first.

Deviations from the paper:
1. GRPO stands in for PPO with a learned critic; `advantage` chooses another estimator.
2. The default of η is 0: the paper calls it small and gives no number. It is counted for each turn.
3. A conversation that outgrows the policy's context ends with the tries that it has, as unsolved.
4. Conversations that end in an infrastructure error are excluded from training and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mulligan.common.experience import Sample
from mulligan.common.rewards import reaches
from mulligan.trainer.algorithms import CUT_TEXTS, READING
from mulligan.trainer.batch import Group, gradients, rewarded, with_reward
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings

FIRST = "first"


class Settings(AlgorithmSettings):
    name: str = "ufo"
    # k: tries in one conversation, at least 1.
    tries: int = Field(5, ge=1, le=100)
    # The user's message after a failed try: `{observation}` is the first of the next one, `{feedback}` what the
    # environment said, which unary feedback leaves out.
    again: str = "Incorrect. Please think again.\n{observation}"
    # γ: what each failed try before the success leaves of its worth, above 0 and up to 1.
    decay: float = Field(0.5, gt=0, le=1)
    # λ ≥ 0: taken from R in the share in which tries repeat each other.
    repetition_penalty: float = Field(0.5, ge=0)
    # η ≥ 0: taken from R for each turn in whose answer the environment found no action.
    invalid_penalty: float = Field(0.0, ge=0)
    # Weight of the branch.
    first_weight: float = Field(1.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return CUT_TEXTS | READING


REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    await member.attempt(FIRST, tries=member.settings.tries, again=member.settings.again)


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """One branch, `first`: the advantage of R among the task's conversations."""
    shaped = [[_shaped(sample, settings) for sample in group] for group in with_reward(groups, FIRST)]
    count = sum(bool(sample.sequences) for group in shaped for sample in group)
    return gradients(shaped, settings, settings.first_weight / max(count, 1), FIRST)


def _shaped(sample: Sample, settings: Settings) -> Sample:
    return rewarded(sample, [0.0] * (len(sample.turns) - 1) + [worth(sample, settings)])


def worth(sample: Sample, settings: Settings) -> float:
    """R. The try that was played last is the one that solved the task, if any did."""
    tries = [turns for turns in sample.tries if turns]  # for the last one there may have been no room
    assert sample.reward is not None
    is_solved = reaches(sample.reward, settings.success_threshold)
    distinct = len({tuple(turn.action for turn in turns) for turns in tries})
    invalid = sum(turn.is_invalid for turn in sample.turns)
    return (
        settings.decay ** (len(tries) - 1) * is_solved
        - settings.repetition_penalty * (1 - distinct / len(tries))
        - settings.invalid_penalty * invalid
    )
