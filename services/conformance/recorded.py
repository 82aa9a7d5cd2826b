"""An environment whose exceptions are recorded, so that its author sees their tracebacks."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from mulligan.env.base import (
    Environment,
    EnvironmentInfo,
    Episode,
    Forkable,
    Split,
    StepResult,
    TaskInfo,
    UnknownTask,
    close,
    fork,
    reads_thoughts,
)

R = TypeVar("R")


class Recorded:
    """Passes calls on to `environment`. `raised` has the tracebacks since it was last cleared, oldest first."""

    def __init__(self, environment: Environment) -> None:
        self.info: EnvironmentInfo = getattr(environment, "info", None)  # type: ignore[assignment]  # a check tells
        self.raised: list[str] = []
        self._environment = environment

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return self.keep(lambda: self._environment.list_tasks(split, offset, limit))

    def start(self, task_id: str) -> Episode:
        return self._episode(self.keep(lambda: self._environment.start(task_id)))

    def close(self) -> None:
        close(self._environment)

    def forked(self, episode: Episode) -> Episode:
        return self._episode(self.keep(lambda: fork(episode)))

    def _episode(self, episode: Episode) -> Episode:
        kind = _RecordedForkable if isinstance(episode, Forkable) else _RecordedEpisode
        return self.keep(lambda: kind(self, episode))

    def keep(self, call: Callable[[], R]) -> R:
        try:
            return call()
        except UnknownTask:
            raise
        except BaseException as error:
            # Without the frames of this file: the author's own come first.
            frames = error.__traceback__
            while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
                frames = frames.tb_next
            text = "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))
            self.raised.append(text.rstrip())
            raise


class _RecordedEpisode:
    def __init__(self, environment: Recorded, episode: Episode) -> None:
        self.observation = episode.observation
        self.player = getattr(episode, "player", 0)
        self.reads_thoughts = reads_thoughts(episode)
        self._environment = environment
        self._inner = episode

    def step(self, action: str) -> StepResult:
        return self._environment.keep(lambda: self._inner.step(action))

    def close(self) -> None:
        self._environment.keep(lambda: close(self._inner))


class _RecordedForkable(_RecordedEpisode):
    def fork(self) -> Episode:
        return self._environment.forked(self._inner)
