"""Whether the policy refuses what has no answer, and answers what has one (arXiv 2505.13988).

- `refusals`: the share of attempts at unanswerable tasks that are refusals, which solve these tasks;
- `accuracy`, `false_refusals`: the shares of attempts at answerable tasks that solve them, and that are refusals.

The tag `answerable` of a task says which it is. A refusal is seen by what the environment read in the last answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pydantic import Field

from mulligan.common.experience import Sample
from mulligan.common.types import EnvironmentInfo, TaskInfo
from mulligan.trainer.player import Player
from mulligan.trainer.protocols import MOST_SAMPLES, ProtocolSettings

TAG = "answerable"


class Settings(ProtocolSettings):
    """`read_as` are the readings of an answer that mean a refusal, without regard to case, spaces and a full stop."""

    name: str = "refusal"
    samples: int = Field(1, ge=1, le=MOST_SAMPLES)
    read_as: tuple[str, ...] = ("refused", "I don't know")


def lacks(environment: EnvironmentInfo, tasks: Sequence[TaskInfo], settings: Settings) -> str:
    if any(task.tags.get(TAG) == "false" for task in tasks):
        return ""
    return f"no test task has the tag {TAG!r} with the value 'false'; expected some without an answer"


async def run(player: Player, tasks: Sequence[TaskInfo], settings: Settings) -> dict[str, float]:
    tagged = [task for task in tasks if task.tags.get(TAG) in ("true", "false")]
    samples = await player.attempts(tagged, settings.samples)
    played = [(tagged[number // settings.samples], sample) for number, sample in enumerate(samples)]
    pairs = [(task, sample) for task, sample in played if sample.reward is not None]
    without = [sample for task, sample in pairs if task.tags[TAG] == "false"]
    answerable = [sample for task, sample in pairs if task.tags[TAG] == "true"]
    readings = {_plain(one) for one in settings.read_as}
    metrics = {}
    if without:
        metrics["refusals"] = fmean(map(player.solves, without))
    if answerable:
        metrics["accuracy"] = fmean(map(player.solves, answerable))
        metrics["false_refusals"] = fmean(_refuses(sample, readings) for sample in answerable)
    return metrics


def _refuses(sample: Sample, readings: set[str]) -> bool:
    return bool(sample.turns) and _plain(sample.turns[-1].action) in readings


def _plain(text: str) -> str:
    return text.replace("\u2019", "'").casefold().strip().removesuffix(".")
