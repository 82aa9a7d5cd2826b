"""How much an agent learns when an attempt is over: the option `feedback` of every environment's table.

Only the final feedback changes. What the agent sees during the attempt, including notices of moves without effect,
stays the same, so that runs with different feedback can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

from mulligan.common.rewards import reaches, read_reward, total
from mulligan.env.base import (
    Environment,
    EnvironmentInfo,
    Episode,
    Split,
    StepResult,
    TaskInfo,
    close,
    fork,
    reads_thoughts,
)

RIGHT = "That was right."
WRONG = "That was wrong, try again."


class Feedback(StrEnum):
    """`full`: the environment's text. `unary`: only whether the task was solved, that is, whether the rewards reached
    the largest possible sum. `silent`: nothing."""

    FULL = "full"
    UNARY = "unary"
    SILENT = "silent"


def with_feedback(environment: Environment, feedback: Feedback) -> Environment:
    return environment if feedback is Feedback.FULL else _Limited(environment, feedback)


class _Limited:
    """An environment whose final feedback is replaced."""

    def __init__(self, environment: Environment, feedback: Feedback) -> None:
        self._environment = environment
        self._feedback = feedback

    @property
    def info(self) -> EnvironmentInfo:
        info = self._environment.info
        return replace(info, description=f"{info.description}; {self._feedback} feedback")

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return self._environment.list_tasks(split, offset, limit)

    def start(self, task_id: str) -> _LimitedEpisode:
        return _LimitedEpisode(self._environment.start(task_id), self._feedback, self.info.max_reward)

    def close(self) -> None:
        close(self._environment)


class _LimitedEpisode:
    def __init__(self, episode: Episode, feedback: Feedback, max_reward: float, rewards: Sequence[float] = ()) -> None:
        self.observation = episode.observation
        self.player = getattr(episode, "player", 0)
        self.reads_thoughts = reads_thoughts(episode)
        self._episode = episode
        self._feedback = feedback
        self._max_reward = max_reward
        self._rewards = list(rewards)

    def step(self, action: str) -> StepResult:
        result = self._episode.step(action)
        if not isinstance(result, StepResult):  # invalid; the server reports it
            return result
        self._rewards.append(read_reward(result.reward))
        if not result.done:
            return result
        unary = RIGHT if reaches(total(self._rewards), self._max_reward) else WRONG
        return replace(result, feedback=unary if self._feedback is Feedback.UNARY else "")

    def fork(self) -> _LimitedEpisode:
        return _LimitedEpisode(fork(self._episode), self._feedback, self._max_reward, self._rewards)

    def close(self) -> None:
        close(self._episode)
