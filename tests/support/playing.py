"""Plays single episodes with a harness."""

from __future__ import annotations

from mulligan.common.experience import Sample
from mulligan.common.inference import SamplingParams
from mulligan.trainer.harness import Harness, Plan


async def play_episode(
    harness: Harness, attempt_id: str, task_id: str, system: str, sampling: SamplingParams
) -> Sample:
    """A first attempt, with seed 0."""
    return await harness.attempt(Sample.planned(attempt_id, "first", system), Plan(task_id, sampling, 0))
