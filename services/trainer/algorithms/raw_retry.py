"""ERL without reflection: the second attempt is given the raw first attempt and its feedback.

An ablation of ERL (arXiv 2602.13949, section 5: "w/o reflection"); it has ERL's settings, and those of reflection and
memory mean nothing.
"""

from __future__ import annotations

from pydantic import Field

from mulligan.common.rewards import exceeds
from mulligan.trainer.algorithms import CUT_TEXTS, READING, Played, erl
from mulligan.trainer.algorithms.erl import train
from mulligan.trainer.member import Member
from mulligan.trainer.texts import fill, trace_of

__all__ = ["PLAYS", "REMEMBERS", "Settings", "play", "train"]


class Settings(erl.Settings):
    name: str = "raw_retry"
    memory_entries: int = Field(0, ge=0, le=100)

    @property
    def without_effect(self) -> frozenset[str]:
        return CUT_TEXTS | READING | {"reflection_weight"}


PLAYS = Played(2, copies=1)
REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    first = await member.attempt(erl.FIRST)
    if first.reward is None or member.solves(first):
        return
    system = fill(member.prompts.retry, trace=trace_of(first, member.prompts), feedback=first.feedback)
    second = await member.attempt(erl.SECOND, system=system, parent=first)
    if second.reward is not None and exceeds(second.reward, 0):
        await member.under(erl.DISTILLED, second, like=first)
