"""Reflect, Retry, Reward: arXiv 2505.24726. Only the reflections are trained.

    y1 ~ π(·|x) → r1              attempt
    r1 ≥ τ: done
    n times:
        Δ  ~ π(·|x, y1, f1)       reflection on the same attempt
        y2 ~ π(·|x, Δ) → r2       retry
    L = RL(Δ), r(Δ) = 1[r2 ≥ τ], against the n reflections on the same attempt; y1 and y2 carry no loss

So the policy learns to reflect, not the task; yet the paper finds that first attempts rise, too.

Published settings, from memory: GRPO, failed attempts collected beforehand, lr 5e-7, batches of 256 failures, KL
coefficient 0.001. Reported: up to 34.7 % more right equations (Countdown) and 18.1 % more right function calls.

Deviations from the paper:
1. Attempts are made anew by the present policy; the paper collects failures once, from the initial model.
2. The retry is told the reflection alone. The paper's goes on in the same conversation, after y1.
3. The reflection sees the environment's feedback; the paper's knows only that the attempt failed.
4. With `reflections` = 1 the reflections on all failed attempts of the task are one group.
5. Samples that end in an infrastructure error are excluded from training and counted; a reflection that was cut at its
   token limit is trained on only with `train_cut_reflections`.

`policies.reflector` has to be empty: nothing but the reflections is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mulligan.common.experience import Experience, Sample
from mulligan.trainer.batch import Group, gradients, rewards_before
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import guided_by

FIRST = "first"
REFLECTION = "reflection"
SECOND = "second"
NEEDS = {"own_reflections"}


class Settings(AlgorithmSettings):
    name: str = "reflect_retry_reward"
    # n: reflections on each failed attempt, each with its own retry; at least 1.
    reflections: int = Field(8, ge=1, le=100)
    # Weight of the branch.
    reflection_weight: float = Field(1.0, ge=0)


REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    first = await member.attempt(FIRST)
    if first.reward is None or member.solves(first):
        return
    for _ in range(member.settings.reflections):
        reflection = await member.reflect(REFLECTION, first)
        if not reflection.outcome.has_reward:
            continue
        second = await member.attempt(SECOND, system=guided_by(reflection.text, member.prompts), parent=reflection)
        if second.reward is not None:
            member.credit(reflection, float(member.solves(second)))


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """One branch, `reflection`."""
    compared = [samples for group in groups for samples in _compared(group, settings)]
    count = sum(bool(sample.sequences) for group in compared for sample in group)
    weight = settings.reflection_weight / max(count, 1)
    return gradients(compared, settings, weight, REFLECTION, rewards_before(groups))


def _compared(group: Group, settings: Settings) -> list[list[Sample]]:
    """The reflections on each failed attempt; all in one where there is one on each."""
    each = [_reflections(one) for one in group]
    return [[sample for samples in each for sample in samples]] if settings.reflections == 1 else each


def _reflections(one: Experience) -> list[Sample]:
    return [sample for sample in one.samples if sample.role == REFLECTION and sample.reward is not None]
