"""An evaluation protocol from outside the trainer: the success under a system prompt of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pydantic import Field

from mulligan.common.types import TaskInfo
from mulligan.trainer.player import Player
from mulligan.trainer.protocols import MOST_SAMPLES, ProtocolSettings
from mulligan.trainer.texts import fill


class Settings(ProtocolSettings):
    """`{solver}` in `system` is the deployed prompt. `samples` are the attempts per task."""

    name: str = "proof.prompted"
    system: str = Field(min_length=1)
    samples: int = Field(1, ge=1, le=MOST_SAMPLES)


async def run(player: Player, tasks: Sequence[TaskInfo], settings: Settings) -> dict[str, float]:
    system = fill(settings.system, solver=player.info.prompts.solver)
    samples = await player.attempts(tasks, settings.samples, system=system)
    solved = [player.solves(sample) for sample in samples if sample.reward is not None]
    return {"success": fmean(solved)} if solved else {}
