"""Preference pairs of a failed attempt and the better one after a reflection: DPO, arXiv 2305.18290.

    y1 ~ π(·|x) → f1, r1
    r1 ≥ τ: done
    Δ  ~ π(·|x, y1, f1, r1, m)
    y2 ~ π(·|x, Δ) → r2
    r2 > r1: the pair y2 ≻ y1, both under x
    L = −log σ(β (log π/π_ref(y2|x) − log π/π_ref(y1|x))) − φ · mean log π(y2|x)

An offline relative of ERL: what the reflection improved is internalised by comparison. The constants are those of SPaR
(arXiv 2412.11605): β 0.1, φ 0.1 (`pref_ftx` of LLaMA-Factory), learning rate 2e-7, one epoch for each reference.

π_ref is the reference that `[loss]` names: the initial weights, or with `kl_reference = "moving"` those of the last
`reference_every` optimizer steps. SPaR begins each iteration with a new one, which is the latter.

Deviations:
1. The tokens of an environment, between the agent's turns, count in neither answer.
2. Pairs are made in each step from the present policy, not once from a fixed one.
3. Where the chat template rewrites earlier turns, an episode is no single token sequence: such runs are refused.
4. The loss of a pair is one number: `aggregation`, and what is set of advantages, mean nothing.
5. Pairs with an infrastructure error are left out. A reflection is stored when r2 ≥ τ, as in ERL, and never trained.
6. π and π_ref are at the temperature that y1 was sampled at (`rollout.temperature`). Published: 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from mulligan.common.rewards import exceeds
from mulligan.trainer.algorithms import ADVANTAGES, AGGREGATION, CUT_TEXTS, POLICY_GRADIENT, Played
from mulligan.trainer.batch import Group, preferences
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.memory_settings import MemoryReaders
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import guided_by

NEEDS = {"tokenize"}
FIRST = "first"
REFLECTION = "reflection"
SECOND = "second"
BETTER = "better"
PAIRS = "pairs"


class Settings(AlgorithmSettings):
    name: str = "dpo_pairs"
    memory_entries: int = Field(1, ge=0, le=100)
    # Both answers of a pair stand under the deployed prompt, so first attempts read nothing.
    memory_readers: Literal[MemoryReaders.REFLECTOR] = MemoryReaders.REFLECTOR
    # β > 0: how far a pair may move the policy away from the reference.
    beta: float = Field(0.1, gt=0)
    # φ ≥ 0: weight of the supervised term on the better answer.
    ftx: float = Field(0.1, ge=0)
    # How much r2 must be above r1, in units of the reward, ≥ 0.
    min_gap: float = Field(0.0, ge=0)
    # Weight of the mean over the pairs, ≥ 0.
    pair_weight: float = Field(1.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return ADVANTAGES | AGGREGATION | POLICY_GRADIENT | CUT_TEXTS


PLAYS = Played(2, texts=1, copies=1)
REMEMBERS = True


async def play(member: Member[Settings]) -> None:
    first = await member.attempt(FIRST)
    if first.reward is None or member.solves(first):
        return
    reflection = await member.reflect(REFLECTION, first)
    if not reflection.outcome.has_reward:
        return
    system = guided_by(reflection.text, member.prompts)
    second = await member.attempt(SECOND, system=system, parent=reflection)
    member.credit(reflection, second.reward)
    if second.reward is None:
        return
    if exceeds(second.reward, first.reward + member.settings.min_gap):
        await member.under(BETTER, second, like=first)
    member.remember(reflection, before=first.reward, after=second.reward)


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """One branch, `pairs`."""
    pairs = [(target, one[FIRST]) for group in groups for one in group if (target := one.target(BETTER))]
    return preferences(pairs, settings.beta, settings.ftx, settings.pair_weight, PAIRS)
