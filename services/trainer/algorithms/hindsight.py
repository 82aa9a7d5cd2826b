"""Learning from all attempts, told apart by words of praise or blame: Chain of Hindsight (arXiv 2302.02676).

    y ~ π(·|x) → r
    r ≥ τ: L = −log π(y | x)                  under the deployed prompt
    r < τ: L = −log π(y | x with "bad")       under a prompt that says so

The words carry no loss. Bad attempts teach what not to do without reinforcement learning: the policy learns to play
badly when it is told to, and the deployed prompt does not tell it to.

Published settings, from memory: GPT-J 6B on human preferences; 15 % of past tokens masked, and pretraining data mixed
in. Reported: preferred over supervised fine-tuning and over RLHF in summarization and dialogue.

Deviations from the paper:
1. The deployed prompt stands for "good", so nothing has to be added at deployment.
2. An example is one attempt. The paper's are chains of a bad and a good answer to the same question, each after its
   word; so its model also sees what it improves on, and needs the masks lest it copies that.
3. No pretraining data are mixed in. Good and bad attempts come from the present policy, not from people.
4. L is the mean over all attempts that have a reward; the paper's chains hold as many good as bad ones.
5. Attempts that end in an infrastructure error are left out and counted, and so are bad ones whose tokens under the
   other prompt cannot be known.
6. Attempts are trained at the temperature that they were sampled at (`rollout.temperature`), not at 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mulligan.common.rewards import reaches
from mulligan.trainer.algorithms import CUT_TEXTS, READING, SUPERVISED, Played
from mulligan.trainer.batch import Group, imitation
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import fill

FIRST = "first"
GOOD = "good"
BAD = "bad"


class Settings(AlgorithmSettings):
    name: str = "hindsight"
    # The system prompt of bad attempts in training; `{solver}` is the deployed one.
    bad: str = "{solver}\nThe following is a bad attempt."
    # Weights of good and bad attempts.
    good_weight: float = Field(1.0, ge=0)
    bad_weight: float = Field(1.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return SUPERVISED | CUT_TEXTS | READING


PLAYS = Played(1, copies=1)
REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    first = await member.attempt(FIRST)
    if first.reward is not None and not member.solves(first):
        await member.under(BAD, first, system=fill(member.settings.bad, solver=member.prompts.solver))


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """Two branches, `good` and `bad`: supervised, without advantages and log-probabilities."""
    tried = [one for group in groups for one in group if one[FIRST].reward is not None]
    good = [one[FIRST] for one in tried if reaches(one[FIRST].reward or 0.0, settings.success_threshold)]
    bad = [(target, one[FIRST].temperature) for one in tried for target in one.targets]
    share = 1 / max(len(tried), 1)
    return [
        *imitation([(sample, sample.temperature) for sample in good], settings, settings.good_weight * share, GOOD),
        *imitation(bad, settings, settings.bad_weight * share, BAD),
    ]
