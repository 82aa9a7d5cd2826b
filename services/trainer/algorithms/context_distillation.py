"""On-policy context distillation (OPCD): arXiv 2602.12275.

    y ~ π(·|x) → f, r                              the student's own attempt
    r < τ: Δ  ~ π(·|x, y, f, r, m)                 what it learnt from a failure
           y2 ~ π(·|x, Δ) → r2;  r2 ≥ τ: m ← Δ     proof that it helps, and memory
    c = the memory's entries, or the proven Δ      the knowledge
    L = 1/|y| Σ_t D_β(π(·|x, y<t) ‖ π̄(·|c, y<t))

The same model with the knowledge in its context is the teacher π̄, without gradient; the student learns to do without.
It is taught on what it samples itself, so it meets its own mistakes. β = 1 is the reverse KL divergence.

Published: reverse KL over the likeliest tokens; knowledge from traces, gathered before the training. Reported: above
distillation from the teacher's own samples in mathematics and text games, and less is forgotten.

Deviations:
1. The teacher has the present weights, and the knowledge grows in the course of the training.
2. Knowledge is kept only where a second attempt with it solved the task.
3. The divergence is over the whole vocabulary.
4. Neither reflections nor second attempts are trained. Infrastructure errors are left out.
5. Student and teacher are at the temperature of the sampling (`rollout.temperature`), not at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

from pydantic import Field

from mulligan.common.experience import Sample
from mulligan.trainer.aggregation import Aggregation
from mulligan.trainer.algorithms import CUT_TEXTS, SUPERVISED, Played
from mulligan.trainer.algorithms.sdpo import TEACHER, taught
from mulligan.trainer.batch import Group
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.memory_settings import MemoryReaders
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import guided_by

FIRST = "first"
REFLECTION = "reflection"
SECOND = "second"


class Knowledge(StrEnum):
    MEMORY = "memory"
    REFLECTION = "reflection"


class Settings(AlgorithmSettings):
    name: str = "context_distillation"
    aggregation: Aggregation = Aggregation.SEQUENCE_MEAN_TOKEN_MEAN
    memory_entries: int = Field(1, ge=0, le=100)
    # The student knows nothing, so first attempts read nothing.
    memory_readers: Literal[MemoryReaders.REFLECTOR] = MemoryReaders.REFLECTOR
    # What the teacher knows: "memory", what the reflection memory had at the start of the step (all attempts are taught
    # then), or "reflection", that of the same member (then its failed attempt is taught, if the reflection is proven).
    knowledge: Knowledge = Knowledge.MEMORY
    # β, from 0 (forward KL divergence) to 1 (reverse).
    beta: float = Field(1.0, ge=0, le=1)
    # Weight of the branch, ≥ 0.
    distillation_weight: float = Field(1.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return SUPERVISED | CUT_TEXTS


PLAYS = Played(2, texts=1, copies=1)
REMEMBERS = True


async def play(member: Member[Settings]) -> None:
    first = await member.attempt(FIRST)
    if first.reward is None:
        return
    proven = None if member.solves(first) else await _proven_reflection(member, first)
    if member.settings.knowledge is Knowledge.REFLECTION:
        texts = [proven.text] if proven else []
    else:
        texts = [entry.text for entry in member.memory]
        member.shown = [entry.reflection_id for entry in member.memory]
    if texts:
        await member.under(TEACHER, first, system=guided_by("\n\n".join(texts), member.prompts))


async def _proven_reflection(member: Member[Settings], first: Sample) -> Sample | None:
    """A reflection on the attempt, if the next one solved the task with it."""
    reflection = await member.reflect(REFLECTION, first)
    if not reflection.outcome.has_reward:
        return None
    system = guided_by(reflection.text, member.prompts)
    second = await member.attempt(SECOND, system=system, parent=reflection)
    member.credit(reflection, second.reward)
    member.remember(reflection, before=first.reward, after=second.reward)
    return reflection if member.solves(second) else None


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """One branch, `taught`: the divergence of the attempts that have a teacher."""
    return taught(groups, FIRST, settings, settings.beta, settings.distillation_weight)
