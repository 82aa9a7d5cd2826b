"""An algorithm of another package: a member plays until it solves its task, and what solved it is reinforced."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mulligan.common.experience import Sample
from mulligan.trainer.batch import Group, gradients
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings

NEEDS = {"own_reflections"}


class Settings(AlgorithmSettings):
    name: str = "persistent"
    first_weight: str = "one"  # ERL's setting of this name is a number
    plays: int = Field(2, ge=1)


async def play(member: Member[Settings]) -> None:
    for _ in range(member.settings.plays):
        if member.solves(await member.attempt("play")):
            return


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    last: list[list[Sample]] = [
        [one.samples[-1] for one in group if one.samples[-1].reward is not None] for group in groups
    ]
    return gradients(last, settings, 1.0, "play")
