"""A protocol of another package: the share of the tasks that one of several attempts solves."""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.common.types import TaskInfo
from mulligan.trainer.player import Player
from mulligan.trainer.protocols import ProtocolSettings


class Settings(ProtocolSettings):
    name: str = "ever"
    attempts: int = 2


async def run(player: Player, tasks: Sequence[TaskInfo], settings: Settings) -> dict[str, float]:
    solved = 0
    for task in tasks:
        played = [await player.attempt(task, number) for number in range(settings.attempts)]
        solved += any(map(player.solves, played))
    return {"solved": solved / len(tasks)}
