"""How long it takes to a success, with several tries in one conversation.

After a try that fails, the policy is told what the environment says of it (`guided`), or only that it failed
(`unguided`), and tries again. Both begin with the same random numbers. For each of the two there are

- `ARM_success@K`: the share of attempts that succeeded within K tries (Succ@k);
- `ARM_corrections`: failed tries before the success, `ARM_turns`: turns up to the end of the successful try; means
  over the attempts that succeeded.

`gain` is guided_success less unguided_success, within all tries: what the feedback is worth beyond trying again.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pydantic import Field

from mulligan.common.experience import Sample
from mulligan.common.rewards import reaches
from mulligan.common.types import TaskInfo
from mulligan.trainer.player import Player
from mulligan.trainer.protocols import MOST_SAMPLES, ProtocolSettings


class Settings(ProtocolSettings):
    """`guided` and `unguided` are the first message of a further try: `{feedback}` is what the environment said,
    `{observation}` what it shows."""

    name: str = "turns"
    tries: int = Field(4, ge=2, le=100)
    samples: int = Field(1, ge=1, le=MOST_SAMPLES)
    guided: str = "{feedback}\n\nTry again.\n\n{observation}"
    unguided: str = "That was not right. Try again.\n\n{observation}"

    @property
    def attempts_per_sample(self) -> int:
        return 2  # guided and unguided


async def run(player: Player, tasks: Sequence[TaskInfo], settings: Settings) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for arm in ("guided", "unguided"):
        again = getattr(settings, arm)
        samples = await player.attempts(tasks, settings.samples, tries=settings.tries, again=again)
        played = [sample for sample in samples if sample.reward is not None]
        metrics |= {f"{arm}_{name}": value for name, value in _metrics(player, played, settings.tries).items()}
    last = f"success@{settings.tries}"
    if f"guided_{last}" in metrics and f"unguided_{last}" in metrics:
        metrics["gain"] = metrics[f"guided_{last}"] - metrics[f"unguided_{last}"]
    return metrics


def _metrics(player: Player, samples: Sequence[Sample], tries: int) -> dict[str, float]:
    if not samples:
        return {}
    needed = [_needed(sample, player.threshold) for sample in samples]  # tries up to the success
    solved = [(count, sample) for count, sample in zip(needed, samples, strict=True) if count is not None]
    metrics = {f"success@{k}": fmean(count is not None and count <= k for count in needed) for k in range(1, tries + 1)}
    if solved:
        metrics["corrections"] = fmean(count - 1 for count, _ in solved)
        metrics["turns"] = fmean(sum(sample.try_turns[:count]) for count, sample in solved)
    return metrics


def _needed(sample: Sample, threshold: float) -> int | None:
    rewards = enumerate(sample.try_rewards, start=1)
    return next((number for number, reward in rewards if reaches(reward, threshold)), None)
