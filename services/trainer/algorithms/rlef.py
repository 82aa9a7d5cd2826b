"""Reinforcement learning from execution feedback (RLEF): arXiv 2410.02089.

    for t = 1 … k, in one conversation:
        a_t ~ π(·|x, a_1, f_1, …, a_{t−1}, f_{t−1})      an answer; f is what its execution gave
        solved: done
    r_t = 1 at the end if it is solved, −1 at the end if not; before it −δ for an invalid answer, else 0
    A_t = Σ_{i ≥ t} r_i − V(x, …, f_{t−1})               one value and one advantage per answer, for all its tokens
    L = RL(a_1 … a_k)

V is the mean of what followed answer t in the conversations of the group that have one (`advantages/turn_level.py`).

Published settings, from memory: 3 answers, δ = 0.2, PPO, a KL penalty of 0.05 against the initial policy inside r_t.
Reported: Llama 3.1 70B on CodeContests from 27.5 to 40.1 % (test set, 3 answers), with an order of magnitude fewer
samples; the feedback must be the true one, random feedback loses most of the gain.

Deviations from the paper:
1. No critic: V is the group's mean. So the first answer has GRPO's advantage without division by the deviation, and a
   last answer that no other conversation of the group came to has advantage 0. Then all are whitened over the step's
   tokens, unless `advantage_settings = {whiten = false}`.
2. The KL penalty is the loss's (`loss.kl_coefficient`), not a part of the reward.
3. What is shown and what is rewarded is the environment's choice (the paper shows public tests, and rewards held-out
   ones). A conversation ends when the reward reaches `success_threshold`; the paper's ends when public tests pass.
4. An answer may be an episode of several turns. Then each turn has its own advantage, and an invalid one costs δ.
5. Conversations that end in an infrastructure error are excluded from training and counted.
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
    name: str = "rlef"
    # One advantage per answer; "grpo" is one per conversation.
    advantage: str = "turn_level"
    # k: answers in one conversation, at least 1.
    tries: int = Field(3, ge=1, le=100)
    # The user's message after a failed answer: `{feedback}` is what the environment said of it, `{observation}` the
    # first observation of the next try.
    again: str = "{feedback}\nGive it another try.\n{observation}"
    # δ ≥ 0: what an answer costs in which the environment found no action, unless it is the last.
    invalid_penalty: float = Field(0.2, ge=0)
    # Weight of the branch.
    first_weight: float = Field(1.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return CUT_TEXTS | READING


REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    await member.attempt(FIRST, tries=member.settings.tries, again=member.settings.again)


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """One branch, `first`: all conversations, each answer with its advantage among the task's."""
    played = with_reward(groups, FIRST)
    shaped = [[rewarded(sample, turn_rewards(sample, settings)) for sample in group] for group in played]
    count = sum(bool(sample.sequences) for group in shaped for sample in group)
    return gradients(shaped, settings, settings.first_weight / max(count, 1), FIRST)


def turn_rewards(sample: Sample, settings: Settings) -> list[float]:
    """r of each turn."""
    assert sample.reward is not None
    at_end = 1.0 if reaches(sample.reward, settings.success_threshold) else -1.0
    return [-settings.invalid_penalty * turn.is_invalid for turn in sample.turns[:-1]] + [at_end]
