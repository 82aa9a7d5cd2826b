"""An environment whose every observation proves which episode it is of, and which actions that has been given:
`kind = "mulligan.testing.chained"`.

An episode shows a chain of hashes over a nonce of its own and all of its actions so far. Whoever knows these can tell
whether an answer is the right one of the right episode, with each action applied once.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass

from mulligan.env.base import EnvironmentInfo, Split, StepResult, TaskInfo, UnknownTask, read_settings
from mulligan.env.prompts import generic_prompts

TASKS = ("plain", "fork-raises", "fork-hangs", "fork-waits", "fork-is-itself", "fork-is-nothing", "bad-player")
SLOW = "slow"  # an action that begins so takes SLOW_SECONDS
SLOW_SECONDS = 0.1


class Chain:
    """What an episode must show. `shown` is its first observation, with the nonce."""

    def __init__(self, shown: str) -> None:
        self.nonce = shown.split()[1]
        self._steps = 0
        self._digest = hashlib.sha256(self.nonce.encode()).digest()
        self._chance = random.Random(self.nonce)

    def copy(self) -> Chain:
        return deepcopy(self)

    def after(self, action: str) -> str:
        """The observation that the action must lead to."""
        self._steps += 1
        drawn = self._chance.random()
        self._digest = hashlib.sha256(self._digest + f"{self._steps} {drawn} {action}".encode()).digest()
        return f"{self._steps} {self._digest.hex()}"


@dataclass(frozen=True, slots=True)
class ChainedSettings:
    """`hang_seconds` is how long a hanging fork takes. `twice` is the step that is applied twice, as a server must
    never do it; 0 for none."""

    max_steps: int = 8
    players: int = 1
    can_fork: bool = True
    hang_seconds: float = 2.0
    twice: int = 0


class ChainedEpisode:
    def __init__(self, task_id: str, environment: Chained) -> None:
        settings = environment.settings
        self.observation = f"nonce {secrets.token_hex(8)}"
        self.player = settings.players - 1 if task_id != "bad-player" else 7
        self._environment = environment
        self._chain = Chain(self.observation)
        self._task_id = task_id
        self._settings = settings
        self._steps = 0

    def step(self, action: str) -> StepResult:
        self._steps += 1
        if action.startswith(SLOW):
            time.sleep(SLOW_SECONDS)
        shown = self._chain.after(action)
        if self._steps == self._settings.twice:
            shown = self._chain.after(action)
        players = self._settings.players
        rewards = tuple(float(player) for player in range(players)) if players > 1 else ()
        done = self._steps >= self._settings.max_steps
        return StepResult(shown, "read", 0.5, done=done, player=self._steps % players, rewards=rewards)

    def fork(self) -> ChainedEpisode:
        if self._task_id == "fork-raises":
            raise RuntimeError("the copier is jammed")
        if self._task_id == "fork-hangs":
            time.sleep(self._settings.hang_seconds)
        if self._task_id == "fork-waits":
            self._environment.gate.wait()
        if self._task_id == "fork-is-nothing":
            return None  # type: ignore[return-value]  # an environment's mistake
        if self._task_id == "fork-is-itself":
            return self
        copied = copy(self)
        copied._chain = self._chain.copy()
        return copied

    def close(self) -> None:
        self._environment.closed.append(self)


class Chained:
    def __init__(self, name: str, settings: ChainedSettings) -> None:
        self.settings = settings
        self.closed: list[ChainedEpisode] = []
        self.gate = threading.Event()  # of forks that wait
        self.info = EnvironmentInfo(
            name=name,
            description="shows what it was told",
            prompts=generic_prompts("Say something.", "Anything will do."),
            max_steps=settings.max_steps,
            max_reward=settings.max_steps * 0.5,
            deterministic=False,  # the nonce is another each time
            task_counts={Split.TRAIN: len(TASKS), Split.TEST: 0},
            can_fork=settings.can_fork,
            player_count=settings.players,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        tasks = [TaskInfo(task_id, split, 1.0) for task_id in TASKS if split is Split.TRAIN]
        return tasks[offset : offset + limit]

    def start(self, task_id: str) -> ChainedEpisode:
        if task_id not in TASKS:
            raise UnknownTask(task_id)
        return ChainedEpisode(task_id, self)


def create(name: str, settings: Mapping[str, object]) -> Chained:
    return Chained(name, read_settings(ChainedSettings, settings))
