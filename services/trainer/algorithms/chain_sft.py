"""Supervised learning of corrections, from a mistake to its repair: LEMMA (arXiv 2503.17439).

    y1 ~ π(·|x) → f1, r1              attempt
    r1 ≥ τ: done
    Δ  ~ π(·|x, y1, f1)               reflection
    y2 ~ π(·|x, Δ) → r2               second attempt
    r2 ≥ τ: the chain (x, y1, f1, Δ, x, y2) is one conversation
    L = −E[log π(Δ|x, y1, f1) + log π(y2|x, y1, f1, Δ)]

So what is learned is to correct oneself in the same conversation: y1 carries no loss, and mistakes are not imitated.

Published: supervised fine-tuning on fewer than 90,000 chains made from MATH and GSM8K. Reported: above fine-tuning on
right answers alone, and above other methods that use mistakes.

Deviations from the paper:
1. The policy writes reflection and correction itself; LEMMA has a stronger model plan mistakes and connect them to the
   correction (its "fresh restart"; "fix and continue" is not here).
2. y1 is followed by the environment's feedback, and Δ by the first observation, as user messages (`ask`, `again`).
   LEMMA's model corrects itself within one answer.
3. Chains are made anew in each step by the present policy, and used in that step alone (`optimizer_steps` times).
4. L is the mean over all first attempts that have a reward. So its size falls with the share that is corrected.
5. All of a chain is trained at the temperature of its second attempt.
6. A chain whose tokens cannot be known is left out and counted, as are infrastructure errors. A reflection that was cut
   at its token limit ends the chain unless `train_cut_reflections`.

`policies.reflector` has to be empty: the trained policy does not know another one's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mulligan.common.types import Outcome
from mulligan.trainer.algorithms import SUPERVISED
from mulligan.trainer.batch import Group, imitation
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import fill, guided_by

FIRST = "first"
REFLECTION = "reflection"
SECOND = "second"
CHAIN = "chain"
NEEDS = {"tokenize", "own_reflections"}


class Settings(AlgorithmSettings):
    name: str = "chain_sft"
    # The message after y1, which Δ answers in the chain; `{feedback}` is what the environment said.
    ask: str = "{feedback}\nWhat went wrong?"
    # The message after Δ, which y2 answers in the chain; `{observation}` is the first observation.
    again: str = "{observation}"
    # Whether Δ carries loss. Without it only y2 does.
    train_reflection: bool = True
    # Weight of the branch.
    chain_weight: float = Field(1.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return SUPERVISED


REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    settings = member.settings
    first = await member.attempt(FIRST)
    if first.reward is None or member.solves(first):
        return
    reflection = await member.reflect(REFLECTION, first)
    is_cut = reflection.outcome is Outcome.TRUNCATED and not settings.train_cut_reflections
    if is_cut or not reflection.outcome.has_reward:
        return
    second = await member.attempt(SECOND, system=guided_by(reflection.text, member.prompts), parent=reflection)
    member.credit(reflection, second.reward)
    if member.solves(second):
        ask = fill(settings.ask, feedback=first.feedback)
        again = fill(settings.again, observation=second.turns[0].observation)
        trained = (False, settings.train_reflection, True)
        await member.joined(CHAIN, [first, reflection, second], [ask, again], trained=trained)


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """One branch, `chain`: supervised, without advantages and log-probabilities."""
    attempts = sum(one[FIRST].reward is not None for group in groups for one in group)
    chains = [(target, one[SECOND].temperature) for group in groups for one in group for target in one.targets]
    return imitation(chains, settings, settings.chain_weight / max(attempts, 1), CHAIN)
