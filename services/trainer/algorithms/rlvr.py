"""Reinforcement learning with verifiable rewards: attempts alone, and their advantages in the group.

    y ~ π(·|x) → r
    L = RL(y), GRPO (arXiv 2402.03300) unless set otherwise

The baseline of ERL (arXiv 2602.13949, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mulligan.trainer.algorithms import CUT_TEXTS, READING, Played, erl
from mulligan.trainer.batch import Group
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings


class Settings(AlgorithmSettings):
    name: str = "rlvr"
    first_weight: float = Field(1.0, ge=0)
    branch_normalization: erl.BranchNormalization = erl.BranchNormalization.OWN_COUNT

    @property
    def without_effect(self) -> frozenset[str]:
        return CUT_TEXTS | READING


PLAYS = Played(1)
REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    await member.attempt("first")


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """The branch `first` of ERL."""
    return erl.train(groups, erl.Settings(**settings.model_dump(exclude={"name"})))
