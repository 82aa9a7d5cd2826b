"""The verdict on a run: every rule that its history, and what the services hold at its end, do not keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mulligan.env.base import Environment
from mulligan.testing.judge import (
    access,
    episodes,
    evaluations,
    gradients,
    learners,
    memories,
    reads,
    rewards,
    versions,
)
from mulligan.testing.judge.gradients import MakeLearner
from mulligan.testing.judge.history import BrokenRule, RecordedCall
from mulligan.testing.judge.state import Final

_ENDED = ("completed", "stopped")  # as somebody wanted it


def judge(
    calls: Sequence[RecordedCall],
    final: Final,
    environments: Mapping[str, Environment],
    learner: MakeLearner | None = None,
) -> list[BrokenRule]:
    """`environments` are those that the run played in, as their model: new ones, by name. `learner` makes models of the
    run's learner; without it, how often a gradient was added is not judged."""
    found = [
        *access.check(calls),
        *episodes.check(calls, environments),
        *versions.check(calls, final),
        *memories.check(calls, final),
        *reads.check(calls, final),
        *learners.check(calls, final),
        *(gradients.check(calls, learner) if learner is not None else ()),
        *evaluations.check(calls, final),
        *rewards.check(calls, final, environments),
    ]
    if final.state not in _ENDED:
        found.append(BrokenRule("run", f"it ended as {final.state}: {final.error}"))
    return found
