"""Calls into environment code. They run on worker threads, and their results are checked here: a bad result fails the
one episode that returned it.

What an exception of environment code says is for the server's log alone: it may quote anything that the process knows.
Callers get its type and the id of the incident (`told`). What is wrong with a result is told in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import structlog

from mulligan.common.errors import DomainError, Reason, fault, incident
from mulligan.common.rewards import BadReward, read_reward
from mulligan.common.types import EpisodeStep, Outcome
from mulligan.env.base import Environment, Episode, Faulted, StepResult, UnknownTask, act, close
from mulligan.env.workers import Job, TimedOut

log = structlog.get_logger()
_ERROR_LENGTH = 500
_TOLD = (Faulted, TimedOut, DomainError, UnknownTask, BadReward)  # what they say is for callers
_MAX_TEXT_BYTES = 16 * 2**20  # far below the limit of a message


@dataclass(frozen=True, slots=True)
class StartResult:
    """The observation of an episode before its next step, and whose turn it is."""

    observation: str
    player: int


def begin(environment: Environment, task_id: str) -> tuple[Episode, StartResult]:
    episode = environment.start(task_id)
    player, observation = getattr(episode, "player", 0), episode.observation
    try:
        return episode, StartResult(_text("observation", observation), _player(player, environment.info.player_count))
    except (TypeError, ValueError) as error:
        raise _unusable(error) from None


def play(episode: Episode, action: str, players: int) -> EpisodeStep:
    result = act(episode, action)
    try:
        return _step(result, players)
    except (TypeError, ValueError) as error:
        raise _unusable(error) from None


def _unusable(error: Exception) -> Faulted:
    """What is wrong with a result is a complete message."""
    return Faulted(f"{type(error).__name__}: {error}")


def _step(result: object, players: int) -> EpisodeStep:
    """Raises TypeError and ValueError."""
    if not isinstance(result, StepResult):
        raise TypeError(f"step returned {type(result).__name__}, not StepResult")
    reward = read_reward(result.reward)
    if result.truncated and not result.done:
        raise ValueError("step returned truncated without done")
    outcome = None
    if result.done:
        outcome = Outcome.TRUNCATED if result.truncated else Outcome.COMPLETED
    return EpisodeStep(
        _text("observation", result.observation),
        _text("action", result.action),
        reward,
        bool(result.done),
        outcome,
        _text("feedback", result.feedback) if result.done else "",
        tool=_text("tool", result.tool),
        player=_player(result.player, players),
        rewards=_rewards(result.rewards, players) if players > 1 or result.rewards else (),
    )


def close_if_given_up(begun: tuple[Episode, StartResult], job: Job) -> tuple[Episode, StartResult]:
    """Closes a new episode whose start or fork was given up before it returned."""
    if job.settled:
        close(begun[0])
    return begun


def stuck(episode: Episode, error: TimedOut) -> Episode:
    return episode if isinstance(episode, _Stuck) else _Stuck(episode, error)


class _Stuck:
    """Replaces an episode in which a call still runs that was given up: no other call may run beside it."""

    observation = ""

    def __init__(self, episode: Episode, error: TimedOut) -> None:
        self._episode = episode
        self._error = error

    def step(self, action: str) -> NoReturn:
        raise TimedOut(f"an earlier call into the episode has not returned: {self._error}")

    def fork(self) -> NoReturn:
        self.step("")

    def close(self) -> None:
        close(self._episode)


def failed_step(error: object, said: str) -> EpisodeStep:
    outcome = Outcome.TIMEOUT if isinstance(error, TimedOut) else Outcome.ENV_ERROR
    return EpisodeStep("", "", None, True, outcome, error=said)


def start_error(environment: str, task_id: str, error: object, said: str) -> DomainError:
    if isinstance(error, DomainError):
        return error
    if isinstance(error, UnknownTask):
        return DomainError(Reason.UNKNOWN_TASK, f"{environment!r} has no task {task_id!r}")
    return DomainError(Reason.ENVIRONMENT_FAILED, f"{environment!r} could not start {task_id!r}: {said}")


def fork_error(environment: str, episode_id: str, error: object, said: str) -> DomainError:
    if isinstance(error, DomainError):
        return error
    return DomainError(Reason.ENVIRONMENT_FAILED, f"{environment!r} could not fork {episode_id!r}: {said}")


def told(error: object, environment: str, **ids: str) -> str:
    """What the caller is told of a failed call. Logs an exception of environment code, with `ids`."""
    if not isinstance(error, BaseException) or isinstance(error, _TOLD):
        return described(error)
    log.error("environment code raised", environment=environment, **ids, incident=incident(error), exc_info=error)
    return fault(error)


def described(error: object) -> str:
    """What the exception says, for the log and for whoever runs the environment."""
    text = str(error) if isinstance(error, Faulted) else f"{type(error).__name__}: {error}"
    return text[:_ERROR_LENGTH].encode("utf-8", "replace").decode()


def _player(player: object, players: int) -> int:
    if not isinstance(player, int) or not 0 <= player < players:
        raise ValueError(f"player is {player!r}, not one of {players} from 0")
    return int(player)


def _rewards(rewards: object, players: int) -> tuple[float, ...]:
    expected = "none, as there is one player" if players == 1 else f"{players} finite numbers"
    if not isinstance(rewards, tuple | list) or len(rewards) != (players if players > 1 else 0):
        raise ValueError(f"rewards are {rewards!r:.100}, not {expected}")
    try:
        return tuple(map(read_reward, rewards))
    except ValueError as error:
        raise ValueError(f"rewards are {rewards!r:.100}, not {expected}: {error}") from None


def _text(name: str, value: object) -> str:
    """Returns text that can be sent. Raises TypeError unless it is a str, UnicodeEncodeError for lone surrogates,
    ValueError if it is too long."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, not str")
    size = len(value) if value.isascii() else len(value.encode())
    if size > _MAX_TEXT_BYTES:
        raise ValueError(f"{name} has {size} bytes; the limit is {_MAX_TEXT_BYTES}")
    return value
