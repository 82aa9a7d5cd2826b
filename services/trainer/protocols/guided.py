"""What a text is worth that stands in the system prompt as a reflection does: a rule, a hint, a reflection of a run.

- `success`: the share of attempts with the text that succeed;
- `gain`: that, less the share of the same attempts without it.

The same test tasks are played each time. So the curve of `success` over a run shows whether the policy still follows
such a text; the second attempts of training do not, as they are played where the first ones failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pydantic import Field

from mulligan.common.types import TaskInfo
from mulligan.trainer.player import Player
from mulligan.trainer.protocols import MOST_SAMPLES, ProtocolSettings
from mulligan.trainer.texts import guided_by


class Settings(ProtocolSettings):
    """`samples` are the attempts per task, with the text and without."""

    name: str = "guided"
    text: str = Field(min_length=1)
    samples: int = Field(1, ge=1, le=MOST_SAMPLES)

    @property
    def attempts_per_sample(self) -> int:
        return 2  # with the text and without


async def run(player: Player, tasks: Sequence[TaskInfo], settings: Settings) -> dict[str, float]:
    guided = await _solved(player, tasks, settings, guided_by(settings.text, player.info.prompts))
    plain = await _solved(player, tasks, settings, None)
    metrics = {"success": fmean(guided)} if guided else {}
    return metrics | ({"gain": fmean(guided) - fmean(plain)} if guided and plain else {})


async def _solved(player: Player, tasks: Sequence[TaskInfo], settings: Settings, system: str | None) -> list[bool]:
    samples = await player.attempts(tasks, settings.samples, system=system)
    return [player.solves(sample) for sample in samples if sample.reward is not None]
