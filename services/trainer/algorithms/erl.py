"""Experiential Reinforcement Learning: arXiv 2602.13949, algorithm 2.

    y1 ~ π(·|x) → f1, r1          attempt
    r1 ≥ τ: done                  no reflection after a success
    Δ  ~ π(·|x, y1, f1, r1, m)    reflection
    y2 ~ π(·|x, Δ) → f2, r2       second attempt, on the identical task
    r2 ≥ τ: m ← Δ                 memory
    L = RL(y1) + RL(Δ) + RL(y2) − E[1(r2 > 0) log π(y2|x)]

The paper's ablations: `memory_entries` 0 (without memory), `distillation_weight` 0 (without internalisation), and the
algorithms `raw_retry` and `try_again` (without reflection). Where another policy writes the reflections
(`policies.reflector`), RL(Δ) is left out: the trained policy did not sample those tokens.

Deviations from the paper and its reference code:
1. The memory takes Δ when r2 ≥ τ. The paper writes r2 > τ, which cannot fire when the largest reward is τ.
2. A group of one has zero advantage (the reference gives it its raw reward).
3. The distilled context is exactly the deployed one, x (the reference's differ by a sentence).
4. Attempts that end in an infrastructure error are excluded from training and counted (the reference gives reward 0).
5. Old log-probabilities come from the learner. The engine's only correct the mismatch between the two, which the
   reference does not correct.
6. A step reads one memory snapshot, taken at its start; its writes follow at its end in (task, rollout) order.
7. All branches, the distilled one too, are trained at the temperature that their tokens were sampled at.
8. Several optimizer steps share a step's data: each sees all branches at equal weight (`batch.minibatches`).
9. A reflection that was cut at its token limit is never stored in the memory, and trained on only with
   `train_cut_reflections`: nobody knows its missing rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from math import fsum

from pydantic import Field

from mulligan.common.experience import Experience
from mulligan.common.rewards import exceeds
from mulligan.trainer.aggregation import aggregate
from mulligan.trainer.algorithms import Played
from mulligan.trainer.batch import Group, distillation, gradients, rewards_before, with_reward
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import guided_by

FIRST = "first"
REFLECTION = "reflection"
SECOND = "second"
DISTILLED = "distilled"


class DistillationLoss(StrEnum):
    RAFT = "raft"
    CROSS_ENTROPY = "cross_entropy"


class BranchNormalization(StrEnum):
    """By what a branch's losses are divided: its own count, the number of the step's chains, or the number of chains as
    if no sample had been lost."""

    OWN_COUNT = "own_count"
    CHAINS = "chains"
    TRAINABLE = "trainable"


class Settings(AlgorithmSettings):
    name: str = "erl"
    memory_entries: int = Field(1, ge=0, le=100)
    distillation_loss: DistillationLoss = DistillationLoss.RAFT
    distillation_weight: float = Field(1.0, ge=0)
    distillation_baseline: bool = False
    first_weight: float = Field(1.0, ge=0)
    reflection_weight: float = Field(1.0, ge=0)
    second_weight: float = Field(1.0, ge=0)
    branch_normalization: BranchNormalization = BranchNormalization.OWN_COUNT


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
    if second.reward is not None and exceeds(second.reward, 0):
        await member.under(DISTILLED, second, like=first)
    member.remember(reflection, before=first.reward, after=second.reward)


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """All data of one step: the samples of each branch, weighted and divided as `BranchNormalization` says.

    Branch `first`: the advantage among the task's first attempts. Branches `reflection` and `second`: the advantage of
    r2 among the task's second attempts; reflections by another policy are left out. Branch `distilled`: no advantage
    and no log-probabilities. Samples with zero advantage are included. Every datum has its sampling temperature.
    """
    groups = [[one for one in group if _reward(one, FIRST) is not None] for group in groups]
    data: list[Datum] = []
    for role, weight in (
        (FIRST, settings.first_weight),
        (REFLECTION, settings.reflection_weight),
        (SECOND, settings.second_weight),
    ):
        samples = with_reward(groups, role)
        count = sum(bool(sample.sequences) for group in samples for sample in group)
        each = weight / _divisor(role, count, groups, settings)
        data += gradients(samples, settings, each, role, rewards_before(groups))
    distilled: list[Datum] = []
    if settings.distillation_weight > 0:
        targets = [(one, group) for group in groups for one in group if one.target(DISTILLED)]
        divisor = _divisor(DISTILLED, len(targets), groups, settings)
        for one, group in targets:
            target = one.target(DISTILLED)
            second = one.sample(SECOND)
            assert target is not None and second is not None and second.reward is not None
            target_weight = distillation_weight(second.reward, group, settings)
            weight = settings.distillation_weight / divisor
            distilled += distillation(target, second.temperature, target_weight, weight, DISTILLED)
    return data + aggregate(distilled, settings.aggregation, settings.aggregation_constant)


def distillation_weight(reward: float, group: Sequence[Experience], settings: Settings) -> float:
    """Weight of one distilled target; 0 means that it is not trained on.

    RAFT (arXiv 2304.06767): max(r2, 0). Cross-entropy: 1 where r2 > 0. With the baseline (RLTF), less the mean reward
    of the task's first attempts, but at least 0, so that a success never becomes less likely.
    """
    if not exceeds(reward, 0):
        return 0.0
    weight = reward if settings.distillation_loss is DistillationLoss.RAFT else 1.0
    if settings.distillation_baseline:
        weight -= fsum(_reward(one, FIRST) or 0.0 for one in group) / len(group)
    return max(weight, 0.0)


def _divisor(branch: str, samples: int, groups: Sequence[Group], settings: Settings) -> float:
    """The number that a branch's losses are divided by (`BranchNormalization`); 1 without samples.

    TRAINABLE: of N chains, R should have a sample and T have one. A sample then weighs R / (T · N), which estimates its
    weight 1 / N under CHAINS if nothing had been lost.
    """
    normalization = settings.branch_normalization
    if normalization is BranchNormalization.OWN_COUNT or not samples:
        return max(samples, 1)
    chains = [one for group in groups for one in group]
    if normalization is BranchNormalization.CHAINS:
        return len(chains)
    if branch == FIRST:
        return samples
    retried = [one for one in chains if len(one.samples) > 1]
    if branch != DISTILLED:
        return len(chains) * samples / len(retried)
    finished = [reward for one in retried if (reward := _reward(one, SECOND)) is not None]
    successes = sum(exceeds(reward, 0) for reward in finished)
    return len(chains) * len(finished) / len(retried) * samples / successes


def _reward(experience: Experience, role: str) -> float | None:
    sample = experience.sample(role)
    return sample.reward if sample is not None else None
