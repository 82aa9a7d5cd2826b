"""Evaluations of scripted policies in the fake environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mulligan.common.types import Split, TaskInfo
from mulligan.trainer.evaluation import evaluate, fit_protocols, measure, open_writers
from mulligan.trainer.events import EvaluationEvent
from mulligan.trainer.harness import Harness
from mulligan.trainer.player import Player
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings
from mulligan.trainer.wire import validated
from tests.support.fakes import FakeEnvironment, FakePolicy


async def player(
    environment: FakeEnvironment,
    policy: FakePolicy,
    protocols: Sequence[Mapping[str, Any]] = (),
    *,
    tags: Mapping[str, Mapping[str, str]] | None = None,
    samples: int = 1,
    seed: int = 0,
    concurrency: int = 8,
    **others: Any,
) -> Player:
    """A player of all tasks of the environment, which have these `tags` by id."""
    settings = validated(EvaluationSettings, {"samples": samples, "protocols": list(protocols)})
    named = await NamedPolicy.open(policy, "")
    harness = Harness(environment, named, await environment.describe("fake"), named.info, "x", 0)
    tasks = [TaskInfo(task, Split.TEST, 1.0, dict((tags or {}).get(task, {}))) for task in environment.answers]
    writers = await open_writers(policy, settings)
    rollout = RolloutSettings(concurrency=concurrency)
    return Player(harness, tasks, settings, rollout, seed, writers=writers, **others)


async def measured(
    environment: FakeEnvironment, policy: FakePolicy, *protocols: Mapping[str, Any], **others: Any
) -> EvaluationEvent:
    """What an evaluation with these protocols finds. Raises DomainError if one does not fit."""
    made = await player(environment, policy, protocols, **others)
    fit_protocols([(made.info, made.tasks)], made.settings)
    return await measure(made, 0, await evaluate(made))


def seed_of(task: str, sample: int, turn: int = 0, seed: int = 0) -> int:
    """The seed of the policy in a turn of an attempt."""
    return derive_seed(derive_seed(seed, "evaluation", task, sample), turn)
