"""What an environment author writes: one class with typed `start`, one episode class with `step`, no gRPC in sight.

An environment is a factory of single-use episodes (there is no `reset`; the habit is tinker-cookbook's `rl/types.py`).
Both may block: the server runs them on worker threads, never on its event loop. An exception ends that episode as
ENV_ERROR and touches no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.common.types import EnvironmentInfo, PromptSet, Split, StepResult, TaskInfo

__all__ = [
    "Environment",
    "EnvironmentInfo",
    "Episode",
    "PromptSet",
    "Split",
    "StepResult",
    "TaskInfo",
    "UnknownTask",
]


class Episode(Protocol):
    observation: str  # the first observation

    def step(self, action: str) -> StepResult:
        """Applies the agent's text. Never called again after `done`."""


class Environment(Protocol):
    info: EnvironmentInfo

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]: ...

    def start(self, task_id: str) -> Episode:
        """Raises UnknownTask when the id is not one of this environment's."""


class UnknownTask(LookupError):
    """The task id is not one of the environment's."""
