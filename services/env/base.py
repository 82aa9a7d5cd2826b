"""The interface of environments: a class with typed `start`, and an episode class with `step`. Authors never see gRPC.

An environment makes single-use episodes; there is no `reset` (as in tinker-cookbook's `rl/types.py`). Both may block:
the server calls them on worker threads, never on its event loop. An exception ends that episode as ENV_ERROR and
affects no other.

An environment or episode that holds a process, a connection or a file may have `close(self) -> None`. What it raises is
logged.

- The server calls an episode's `close` once, when the episode is over, ended or expired, or the server drains; on a
  worker thread, after the last call into it has returned. Only a call that was given up because it took too long may
  still run then: `close` should make it return.
- The server calls an environment's `close` once, after its episodes were closed.

The module also has `create(name, settings) -> Environment`. The server calls it for each table `[environments.NAME]`
that names the module. `settings` is an instance of the module's dataclass `Settings`, read from that table; or the
table, if the module has no `Settings`. A ValueError stops the server and is shown to whoever started it; a MissingExtra
lists the environment as unavailable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import Flag, auto
from typing import Any, Protocol, TypeVar, get_type_hints, runtime_checkable

from pydantic import TypeAdapter, ValidationError

from mulligan.common.extras import MissingExtra
from mulligan.common.inference import Tool
from mulligan.common.number_settings import number_problem
from mulligan.common.suggest import did_you_mean
from mulligan.common.thoughts import without_thoughts
from mulligan.common.types import EnvironmentInfo, PromptSet, Split, StepResult, TaskInfo

__all__ = [
    "CanBeUnanswerable",
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
    "Versions",
    "act",
    "close",
    "fork",
    "read_settings",
    "reads_thoughts",
]


class Episode(Protocol):
    """One episode. In a game of several players it also has `player: int`, whose turn it is at the start; without it,
    0.

    The server makes one call into an episode at a time, but not always on the same thread.
    """

    observation: str  # the first observation

    def step(self, action: str) -> StepResult:
        """Applies the agent's answer, without its thoughts (`services/common/thoughts.py`). An episode with
        `reads_thoughts = True` gets the whole answer. Never called after `done`."""


@runtime_checkable
class Forkable(Episode, Protocol):
    """An episode of an environment with `info.can_fork`."""

    def fork(self) -> Episode:
        """Returns an independent episode in exactly this state, including random generators. Never called during
        `step`. An exception fails the fork alone."""


class Environment(Protocol):
    @property
    def info(self) -> EnvironmentInfo:
        """May change, for example when the environment learns later whether it is available."""

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]: ...

    def start(self, task_id: str) -> Episode:
        """Makes an episode. Raises UnknownTask for an id of no task."""


class Versions(Flag):
    """In which versions a task can be played: as one with a right answer, as one without, or as either."""

    ANSWERABLE = auto()
    UNANSWERABLE = auto()
    BOTH = ANSWERABLE | UNANSWERABLE


@runtime_checkable
class CanBeUnanswerable(Environment, Protocol):
    """An environment whose tasks have versions without a right answer. `kind = "unanswerable"` mixes them with the
    others, and gives the reward."""

    @property
    def transformations(self) -> Sequence[str]:
        """The names of the ways to make a task unanswerable, the usual one first."""

    def versions(self, split: Split, transformation: str) -> Sequence[Versions] | None:
        """The versions of each task, in the order of `list_tasks`. None means that all have both."""

    def start_unanswerable(self, task_id: str, transformation: str) -> Episode:
        """Starts the version without a right answer. Its rewards are ignored. Raises UnknownTask, also for a task that
        has no such version."""


class UnknownTask(LookupError):
    """The environment has no task with this id."""


class Faulted(Exception):
    """An environment failed. The message is complete: no traceback would add to it."""


def fork(episode: Episode) -> Episode:
    """Forks an episode. Raises Faulted if the environment says `can_fork` but the episode has no valid `fork`."""
    if not isinstance(episode, Forkable):
        raise Faulted(f"can_fork is set, but {type(episode).__name__} has no fork")
    copied = episode.fork()
    if copied is episode or not callable(getattr(copied, "step", None)):
        what = "the episode itself" if copied is episode else type(copied).__name__
        raise Faulted(f"fork returned {what}, not another episode")
    return copied


def act(episode: Episode, action: str) -> StepResult:
    """Plays an agent's answer. Text in a thought is never an action, in any environment."""
    return episode.step(action if reads_thoughts(episode) else without_thoughts(action))


def reads_thoughts(episode: Episode) -> bool:
    return bool(getattr(episode, "reads_thoughts", False))


def close(held: Episode | Environment) -> None:
    """Calls `close` if there is one."""
    method: Callable[[], None] | None = getattr(held, "close", None)
    if method is not None:
        method()


S = TypeVar("S")


def own_settings(plugin: Any, table: Mapping[str, object]) -> Any:
    """Returns what a plug-in's `create` takes: an instance of its dataclass `Settings`, read from the table, or the
    table if it exports none. Raises ValueError, which names the setting."""
    kind = getattr(plugin, "Settings", None)
    return dict(table) if kind is None else read_settings(kind, table)


def read_settings(kind: type[S], values: Mapping[str, object]) -> S:
    """Makes the settings dataclass of an environment from its TOML table. Raises ValueError, which names the
    setting."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # `kind` is a dataclass
    unknown = sorted(set(values) - set(known))
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise ValueError(f"{unknown[0]}: no such setting{near}; there are: {', '.join(known)}")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if said := number_problem(value, hints[name]):
            raise ValueError(f"{name}: {said}")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        problems = (": ".join([*map(str, item["loc"]), item["msg"]]) for item in error.errors())
        raise ValueError("; ".join(problems)) from error
