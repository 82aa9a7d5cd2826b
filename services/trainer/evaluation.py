"""Evaluation: first attempts only, without a reflection in context: the policy as it is deployed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from statistics import fmean

from mulligan.common.experience import Sample
from mulligan.common.inference import SamplingParams
from mulligan.common.rewards import reaches
from mulligan.common.tasks import gather_or_cancel
from mulligan.trainer.events import EvaluationEvent
from mulligan.trainer.harness import Harness, Plan
from mulligan.trainer.metrics import rewards_of
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings


class EvaluationFailed(RuntimeError):
    """None of an evaluation's attempts could be finished."""


async def evaluate(
    harness: Harness,
    name: str,
    task_ids: Sequence[str],
    settings: EvaluationSettings,
    rollout: RolloutSettings,
    seed: int,
    on_end: Callable[[Sample], None] = lambda attempt: None,
) -> list[Sample]:
    """Plays each task `settings.samples` times.

    `name` begins the attempts' ids and is unique for each evaluation. Evaluations with the same `seed` use the same
    random numbers. `on_end` is called with each attempt when it ends.
    """
    sampling = SamplingParams(settings.temperature, settings.top_p, settings.top_k, rollout.max_tokens)
    slots = asyncio.Semaphore(rollout.concurrency)

    async def limited(slot: int, task_id: str, sample: int) -> Sample:
        async with slots:
            attempt_id = f"{name}-t{slot}-r{sample}"  # a task's id may be as long as an attempt's
            attempt_seed = derive_seed(seed, "evaluation", task_id, sample)
            blank = Sample.planned(attempt_id, "first", harness.info.prompts.solver)
            attempt = await harness.attempt(blank, Plan(task_id, sampling, attempt_seed))
            on_end(attempt)
            return attempt

    return await gather_or_cancel(
        limited(slot, task_id, sample) for slot, task_id in enumerate(task_ids) for sample in range(settings.samples)
    )


def evaluation_of(step: int, attempts: Sequence[Sample], threshold: float) -> EvaluationEvent:
    """Averages over the attempts with a reward. Raises EvaluationFailed when there is none."""
    rewards = rewards_of(attempts)
    if not rewards:
        causes = sorted({attempt.error for attempt in attempts})
        raise EvaluationFailed("no attempt could be finished: " + "; ".join(causes[:3]))
    success = fmean(reaches(reward, threshold) for reward in rewards)
    return EvaluationEvent(step, success, fmean(rewards), len(rewards), len(attempts) - len(rewards))
