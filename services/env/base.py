"""What an environment author writes: one class with typed `start`, one episode class with `step`, no gRPC in sight.

An environment is a factory of single-use episodes (there is no `reset`; the habit is tinker-cookbook's `rl/types.py`).
Both may block: the server runs them on worker threads, never on its event loop. An exception ends that episode as
ENV_ERROR and touches no other.

What holds more than memory (a process, a connection, a file) may also have `close(self) -> None`:

- of an episode: called once, when the episode is over, ended or expired, or the server drains; on a worker thread,
  after its last call has returned. A call that was given up because it took too long may still run: `close` then is
  what should make it return.
- of an environment: called once, as the server ends, after its episodes were closed.

What it raises is logged, no more.

The module also has `create(name, settings) -> Environment`, which the server calls for each `[environments.NAME]` table
of its configuration that names the module; a ValueError stops the server and is shown to whoever started it, and a
MissingExtra lists the environment as unavailable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Protocol, TypeVar, runtime_checkable

from pydantic import TypeAdapter, ValidationError

from mulligan.common.extras import MissingExtra
from mulligan.common.inference import Tool
from mulligan.common.suggest import did_you_mean
from mulligan.common.thoughts import without_thoughts
from mulligan.common.types import EnvironmentInfo, PromptSet, Split, StepResult, TaskInfo

__all__ = [
    "Environment",
    "EnvironmentInfo",
    "Episode",
    "Faulted",
    "Forkable",
    "MissingExtra",
    "PromptSet",
    "Split",
    "StepResult",
    "TaskInfo",
    "Tool",
    "UnknownTask",
    "act",
    "close",
    "fork",
    "read_settings",
    "reads_thoughts",
]


class Episode(Protocol):
    """An episode of a game of several players also has `player: int`, whose turn it is at the start (0 without).

    The server makes one call into an episode at a time, though not always on the same thread."""

    observation: str  # the first observation

    def step(self, action: str) -> StepResult:
        """Applies the agent's answer, which comes without its thoughts (`services/common/thoughts.py`); an episode that
        has `reads_thoughts = True` gets all of it. Never called again after `done`."""


@runtime_checkable
class Forkable(Episode, Protocol):
    """What the episodes of an environment with `info.can_fork` offer besides."""

    def fork(self) -> Episode:
        """An independent episode in exactly this state, random generators included. Never called during `step`. What
        it raises fails the fork alone."""


class Environment(Protocol):
    @property
    def info(self) -> EnvironmentInfo:
        """An attribute like any other; it changes in one that learns later whether it is available."""

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]: ...

    def start(self, task_id: str) -> Episode:
        """Raises UnknownTask when the id is not one of this environment's."""


class UnknownTask(LookupError):
    """The task id is not one of the environment's."""


class Faulted(Exception):
    """An environment failed; the message says all that is known of it."""


def fork(episode: Episode) -> Episode:
    """Raises TypeError when an episode, whose environment says `can_fork`, cannot."""
    if not isinstance(episode, Forkable):
        raise TypeError(f"can_fork is set, but {type(episode).__name__} has no fork")
    copied = episode.fork()
    if copied is episode or not callable(getattr(copied, "step", None)):
        what = "the episode itself" if copied is episode else type(copied).__name__
        raise TypeError(f"fork returned {what}, not another episode")
    return copied


def act(episode: Episode, action: str) -> StepResult:
    """What comes of an agent's answer. What stands in a thought is no action, in whatever environment."""
    return episode.step(action if reads_thoughts(episode) else without_thoughts(action))


def reads_thoughts(episode: Episode) -> bool:
    return bool(getattr(episode, "reads_thoughts", False))


def close(held: Episode | Environment) -> None:
    """Frees what it holds, where it holds anything."""
    method: Callable[[], None] | None = getattr(held, "close", None)
    if method is not None:
        method()


S = TypeVar("S")


def read_settings(kind: type[S], values: Mapping[str, object]) -> S:
    """The dataclass of an environment's settings, from its TOML table. Raises ValueError that names the setting."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # a dataclass, as it says
    unknown = sorted(set(values) - set(known))
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise ValueError(f"{unknown[0]}: no such setting{near}; there are: {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        problems = (": ".join([*map(str, item["loc"]), item["msg"]]) for item in error.errors())
        raise ValueError("; ".join(problems)) from error
