"""My game: find a hidden number. Replace it by yours; what to change is marked with CHANGE.

    mulligan env play my_game       lets you play it
    mulligan env check my_game      says in words what is wrong with it

To serve it, start `python -m mulligan.env --config env.toml` in the folder of this file:

    [environments.my-game]     # the name under which clients ask for it
    kind = "my_game"           # this module
    highest = 50               # settings: the fields of Settings
    feedback = "full"          # or unary, or silent: of every environment
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

from mulligan.env import EnvironmentInfo, Split, StepResult, TaskInfo, UnknownTask, generic_prompts


# CHANGE: what a server's configuration can set. A ValueError stops the server and is shown to whoever started it.
@dataclass(frozen=True, slots=True)
class Settings:
    highest: int = 20
    max_steps: int = 5  # the true limit: an episode ends at this many steps
    train_tasks: int = 1_000
    test_tasks: int = 100
    name: str = "my_game"

    def __post_init__(self) -> None:
        if not 2 <= self.highest <= 1_000_000:
            raise ValueError(f"highest must be between 2 and 1000000, not {self.highest}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {self.max_steps}")
        for setting, number in (("train_tasks", self.train_tasks), ("test_tasks", self.test_tasks)):
            if not 0 <= number <= 99_999:
                raise ValueError(f"{setting} must be between 0 and 99999, not {number}")


# CHANGE: the game. One object per attempt; what changes belongs to it and is shared with no other.
class MyGameEpisode:
    def __init__(self, hidden: int, settings: Settings) -> None:
        self.observation = f"I have a number from 1 to {settings.highest}."  # the first thing that the agent sees
        self._hidden = hidden
        self._settings = settings
        self._steps = 0

    def step(self, action: str) -> StepResult:
        """`action` is the agent's answer without its thoughts. Agents write anything: what cannot be read must not
        raise."""
        self._steps += 1
        guess = read_guess(action)
        if guess == self._hidden:
            return StepResult("That is it.", str(guess), reward=1.0, done=True, feedback="The number was found.")
        if guess is None:
            observation = "There was no number between triple backticks."
            reading = "invalid"
        else:
            observation = "It is higher." if guess < self._hidden else "It is lower."
            reading = str(guess)  # how a trace shows the answer
        if self._steps >= self._settings.max_steps:
            # `feedback` is for the reflection after the attempt; the agent does not see it while it plays.
            return StepResult(observation, reading, done=True, truncated=True, feedback="The number was not found.")
        return StepResult(observation, reading)

    def fork(self) -> MyGameEpisode:
        """An independent episode in exactly this state. Without it, set can_fork=False below."""
        return copy(self)


def read_guess(answer: str) -> int | None:
    """The number in the last pair of triple backticks."""
    found = re.findall(r"```\s*([0-9]{1,9})\s*```", answer)
    return int(found[-1]) if found else None


class MyGame:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._counts = {Split.TRAIN: settings.train_tasks, Split.TEST: settings.test_tasks}
        self.info = EnvironmentInfo(
            name=settings.name,
            description=f"Find a number from 1 to {settings.highest}",
            # CHANGE: what the agent is told. Without generic_prompts: a PromptSet with texts of your own.
            prompts=generic_prompts(
                f"Find the hidden number from 1 to {settings.highest}. You are told whether it is higher or lower.",
                f"You have {settings.max_steps} guesses. End each answer with one number in triple backticks: ```7```.",
            ),
            max_steps=settings.max_steps,
            max_reward=1.0,  # the largest sum of an episode's rewards
            deterministic=True,  # the same task and actions lead to the same observations and rewards
            task_counts=self._counts,
            can_fork=True,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        """CHANGE the difficulty, in any unit: here the same for all."""
        last = min(offset + limit, self._counts[split])
        return [TaskInfo(f"{split}/{index:05d}", split, difficulty=1.0) for index in range(offset, last)]

    def start(self, task_id: str) -> MyGameEpisode:
        """CHANGE how a task is made of its id, and of nothing else: it must be the same on every machine."""
        split, _, digits = task_id.partition("/")
        listed = split in tuple(Split) and re.fullmatch(r"[0-9]{5}", digits)
        if not listed or int(digits) >= self._counts[Split(split)]:
            raise UnknownTask(f"{task_id[:80]!r} is not a task of {self.info.name}")
        hidden = random.Random(task_id).randint(1, self._settings.highest)
        return MyGameEpisode(hidden, self._settings)


def create(name: str, settings: Settings) -> MyGame:
    """What the server calls for each [environments.NAME] table whose kind is this module."""
    return MyGame(replace(settings, name=name))
