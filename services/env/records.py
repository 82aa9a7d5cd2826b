"""What the episode table keeps of an episode, and what it refuses on the strength of that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import EpisodeStep
from mulligan.env.base import Episode
from mulligan.env.calls import StartResult, play
from mulligan.env.workers import Job


class StepRequest(NamedTuple):
    episode_id: str
    step_index: int
    action: str


class Latch:
    """Opens once all the steps that a call waits for have their answers."""

    __slots__ = ("left", "opened")

    def __init__(self, opened: asyncio.Future[None], left: int):
        self.opened = opened
        self.left = left

    def count_down(self) -> None:
        self.left -= 1
        if self.left == 0 and not self.opened.done():
            self.opened.set_result(None)


class RunningStep(Job):
    """The job of a step, and what those who wait for it find there."""

    __slots__ = ("action", "answer", "latches", "played", "record")

    def __init__(self, record: EpisodeRecord, action: str, played: Callable[[RunningStep, object], None]):
        super().__init__()
        self.record = record
        self.action = action
        self.played = played
        self.answer: EpisodeStep | None = None
        self.latches: list[Latch] = []

    def call(self) -> EpisodeStep:
        return play(episode_of(self.record), self.action, self.record.players)

    def done(self, result: object) -> None:
        self.played(self, result)


@dataclass(slots=True)
class EpisodeRecord:
    episode_id: str
    environment: str
    task_id: str
    players: int
    started: asyncio.Future[StartResult]
    touched: float
    source: tuple[str, int] | None = None  # of a copy: the episode that was forked, and the steps it had played
    episode: Episode | None = None
    # Actions as their hashes: Python's are 64 bits with a key of the process, and an action may be megabytes.
    actions: list[int] = field(default_factory=list)
    answers: list[EpisodeStep] = field(default_factory=list)
    running: RunningStep | None = None
    calling: bool = False  # a call into the episode is under way
    held: list[Job] = field(default_factory=list)  # calls that wait for it
    released: bool = False  # over, ended or expired: what it holds is freed, or will be

    @property
    def finished(self) -> bool:
        return bool(self.answers) and self.answers[-1].done

    @property
    def busy(self) -> bool:
        return self.calling or self.running is not None or not self.started.done()


def episode_of(record: EpisodeRecord) -> Episode:
    assert record.episode is not None
    return record.episode


def check_place(source: EpisodeRecord, episode_id: str, step_index: int) -> None:
    """Raises unless the episode goes on, has played this many steps, and plays none now."""
    played = len(source.answers)
    if source.finished:
        raise DomainError(Reason.EPISODE_FINISHED, f"episode {episode_id!r} was over after {played} steps")
    if step_index > played:
        message = f"episode {episode_id!r} has played {played} steps, not {step_index}"
        raise DomainError(Reason.STEP_SKIPPED, message, next_step_index=played)
    if step_index < played or source.running is not None:
        state = f"plays step {played}" if source.running is not None else f"has played {played} steps"
        raise DomainError(Reason.STEP_CONFLICT, f"episode {episode_id!r} {state}: no fork after {step_index}")


def in_use(episode_id: str, record: EpisodeRecord) -> DomainError:
    origin = "" if record.source is None else ", a fork of {!r} after {} steps".format(*record.source)
    message = f"episode {episode_id!r} plays {record.task_id!r} of {record.environment!r}{origin}"
    return DomainError(Reason.EPISODE_CONFLICT, message)


def conflict(request: StepRequest) -> DomainError:
    message = f"step {request.step_index} of episode {request.episode_id!r} was played with another action"
    return DomainError(Reason.STEP_CONFLICT, message)
