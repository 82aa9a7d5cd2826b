"""The chance that one of k attempts solves a task: the unbiased estimate of Chen et al., arXiv 2107.03374, equation 1.

`pass@K`: of n attempts at a task c solve it; the mean over tasks of 1 − C(n − c, k) / C(n, k). Attempts without a
reward do not count, and a task with fewer than k others does not count for that k.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import fmean
from typing import Annotated, Self

from pydantic import Field, model_validator

from mulligan.common.plugins import located
from mulligan.common.types import TaskInfo
from mulligan.trainer.player import Player
from mulligan.trainer.protocols import MOST_SAMPLES, ProtocolSettings


class Settings(ProtocolSettings):
    """`samples` are the attempts per task, the largest of `k` if None. The evaluation's own are among them."""

    name: str = "pass_at_k"
    k: tuple[Annotated[int, Field(ge=1, le=MOST_SAMPLES)], ...] = Field((1, 2, 4), min_length=1, max_length=64)
    samples: int | None = Field(None, le=MOST_SAMPLES)

    @model_validator(mode="after")
    def _samples_suffice(self) -> Self:
        if self.samples is not None and self.samples < max(self.k):
            raise located({("samples",): f"expected at least the largest k, {max(self.k)}"})
        return self

    @property
    def samples_per_task(self) -> tuple[str, int]:
        return ("k", max(self.k)) if self.samples is None else ("samples", self.samples)


async def run(player: Player, tasks: Sequence[TaskInfo], settings: Settings) -> dict[str, float]:
    _, count = settings.samples_per_task
    samples = await player.attempts(tasks, count)
    rewarded = [
        [player.solves(sample) for sample in samples[start : start + count] if sample.reward is not None]
        for start in range(0, len(samples), count)
    ]
    estimates = {k: [pass_at(k, len(one), sum(one)) for one in rewarded if len(one) >= k] for k in settings.k}
    return {f"pass@{k}": fmean(values) for k, values in estimates.items() if values}


def pass_at(k: int, attempts: int, successes: int) -> float:
    """1 − C(n − c, k) / C(n, k), with at least k attempts."""
    return 1 - comb(attempts - successes, k) / comb(attempts, k)
