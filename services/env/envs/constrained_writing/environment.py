"""Sentences under constraints, one turn each: a number of words at most, words that it must have, and others. A program
checks them all, as in IFEval (arXiv 2311.07911), and the feedback names each that was broken. Whether a sentence means
anything is not checked.

A task such as `train/00012` depends on its id and the settings alone. The words of test tasks are in no training task.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

from mulligan.common.suggest import did_you_mean
from mulligan.env import numbered
from mulligan.env.base import EnvironmentInfo, PromptSet, Split, StepResult, TaskInfo
from mulligan.env.envs.constrained_writing.constraints import (
    FURTHER,
    LEAST_WORDS,
    Check,
    at_most,
    includes,
    no_sentence,
    sentence_of,
)
from mulligan.env.envs.constrained_writing.words import NOUNS
from mulligan.env.numbered import MAX_TASKS
from mulligan.env.prompts import generic_prompts
from mulligan.env.tool_calls import printable

INVALID = "invalid"
GOOD = "It keeps all rules."
TEST_SHARE = 5  # one noun in five is for test tasks
_SHOWN = 300  # characters of an answer that a reflection sees


@dataclass(frozen=True, slots=True)
class Settings:
    """A sentence has at most `limit_min` to `limit_max` words, and `include` given nouns among them. `further` more
    constraints are drawn for each task from `kinds` (all by default: without_letter, begins_with, lower_case, question,
    no_commas). With `partial`, an answer that breaks some of the rules has the share that it keeps as its reward, else
    0."""

    limit_min: int = 8
    limit_max: int = 14
    include: int = 1
    further: int = 0
    kinds: tuple[str, ...] = tuple(FURTHER)
    partial: bool = False
    train_tasks: int = 1_000
    test_tasks: int = 100
    seed: int = 0
    prompts: str = "full"  # or "short": for small models, which read little and follow less
    name: str = "constrained_writing"

    def __post_init__(self) -> None:
        for setting, number, least, most in (
            ("include", self.include, 0, 5),
            ("limit_min", self.limit_min, LEAST_WORDS + self.include, 100),
            ("limit_max", self.limit_max, self.limit_min, 100),
            ("train_tasks", self.train_tasks, 0, MAX_TASKS),
            ("test_tasks", self.test_tasks, 0, MAX_TASKS),
            ("further", self.further, 0, len(self.kinds)),
        ):
            if not least <= number <= most:
                raise ValueError(f"{setting} must be between {least} and {most}, not {number}")
        for kind in self.kinds:
            if kind not in FURTHER:
                near = did_you_mean(kind, FURTHER)
                raise ValueError(f"kinds: there is no {kind!r}{near}; there are: {', '.join(FURTHER)}")
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must differ, not {', '.join(self.kinds)}")
        if self.prompts not in _PROMPTS:
            raise ValueError(f"prompts must be one of {', '.join(_PROMPTS)}, not {self.prompts!r}")


class WritingEpisode:
    """One sentence, which is to pass the `checks`."""

    def __init__(self, observation: str, checks: Sequence[Check], partial: bool) -> None:
        self.observation = observation
        self._checks = checks
        self._partial = partial

    def step(self, action: str) -> StepResult:
        sentence = sentence_of(action)
        if not sentence:
            return StepResult("", INVALID, done=True, feedback="No sentence was written.")
        problems = [problem for check in self._checks if (problem := check(sentence))]
        reward = 0.0 if problems else 1.0
        if problems and self._partial:
            reward = 1.0 - len(problems) / len(self._checks)
        shown = printable(sentence, _SHOWN)
        return StepResult("", shown, reward, done=True, feedback=" ".join(problems) or GOOD)

    def fork(self) -> WritingEpisode:
        return copy(self)  # nothing in it changes


class ConstrainedWriting:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._nouns = {split: [noun for noun in NOUNS if _split_of(noun) is split] for split in Split}
        self._counts = {Split.TRAIN: settings.train_tasks, Split.TEST: settings.test_tasks}
        self.info = EnvironmentInfo(
            name=settings.name,
            description="Write a sentence under constraints that a program checks",
            prompts=_PROMPTS[settings.prompts],
            max_steps=1,
            max_reward=1.0,
            deterministic=True,
            task_counts=self._counts,
            can_fork=True,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        """A task's difficulty is the number of its constraints."""
        difficulty = 1.0 + self.settings.include + self.settings.further
        return [TaskInfo(task_id, split, difficulty) for task_id in numbered.ids(split, offset, limit, self._counts)]

    def start(self, task_id: str) -> WritingEpisode:
        split, _ = numbered.read_id(task_id, self._counts, self.info.name)
        settings = self.settings
        rng = random.Random(f"{settings.seed}/{task_id}")
        limit = rng.randint(settings.limit_min, settings.limit_max)
        given = rng.sample(self._nouns[split], settings.include)
        further = [FURTHER[kind](given, rng) for kind in rng.sample(settings.kinds, settings.further)]
        request = " ".join([_request(limit, given), *(rule.request for rule in further)])
        checks = [no_sentence, at_most(limit), *map(includes, given), *(rule.problem for rule in further)]
        return WritingEpisode(request, checks, settings.partial)


def _request(limit: int, given: Sequence[str]) -> str:
    """The number of words and the given nouns are one sentence: small models follow it better."""
    quoted = [f'"{noun}"' for noun in given]
    named = f" with the word{'s' * (len(given) > 1)} {' and '.join(quoted)}" if given else ""
    return f"Write a sentence of at most {limit} words{named}."


def _split_of(noun: str) -> Split:
    is_test = hashlib.sha256(noun.encode()).digest()[0] % TEST_SHARE == 0
    return Split.TEST if is_test else Split.TRAIN


def create(name: str, settings: Settings) -> ConstrainedWriting:
    return ConstrainedWriting(replace(settings, name=name))


_REMINDER = "You write short sentences."
_PROMPTS = {
    "full": generic_prompts(
        "Write one sentence that keeps all the rules you are given.",
        f"Answer with the sentence alone. It has at least {LEAST_WORDS} words and ends with a full stop, a question "
        "mark or an exclamation mark. A program checks it.",
    ),
    "short": PromptSet(
        solver=_REMINDER,
        action_reminder=_REMINDER,
        reflection_system="You give short rules for writers.",
        reflection="{trace}The sentence was wrong. {feedback}\nA rule that helped before: {memory}\nWhat is the rule?",
        memory_empty="Keep to the number of words, and use the word that was given.",
        trace_turn="{observation}\nAnswer: {action}\n",
        retry=f"{{trace}}Your sentence was wrong. {{feedback}}\n{_REMINDER}",
        try_again=f"Your last answer was wrong. Try again.\n{_REMINDER}",
    ),
}
