"""Questions from files, one turn each: multiple choice (letters) or exact answers. `data.py` has the formats of the
files, `score.py` says when an answer is right. Without files it asks the sixty questions that come along, which were
written for this project: sums, questions on short texts about things that do not exist, and multiple choice, each with
a version that has no answer.

A question that only has a version without an answer is right if it is refused, as in SUM's test file. `kind =
"unanswerable"` mixes both versions, and gives its own reward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

from mulligan.env.answers import AnswerFormat
from mulligan.env.base import EnvironmentInfo, Split, StepResult, TaskInfo, UnknownTask, Versions
from mulligan.env.envs.questions.data import (
    REFUSAL,
    OwnRow,
    QuestionEntry,
    SumPair,
    SumTest,
    by_id,
    hashed,
    read_entries,
    text_of,
    without,
)
from mulligan.env.envs.questions.score import LETTERS, is_right, read
from mulligan.env.envs.questions.steer_bench import ALL, STEERING, read_steer_bench
from mulligan.env.files import required
from mulligan.env.grid import TEST_SHARE
from mulligan.env.prompts import generic_prompts
from mulligan.env.tool_calls import printable

OVER = "The episode is over."
INVALID = "invalid"
FORMATS = ("questions", "sum", "steer-bench")
FROM_DATA = "data"
NO_RIGHT_CHOICE = "no_right_choice"
_SHOWN = 200
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Settings:
    """`train_file` and `test_file` are files or patterns, of the format `format`. Without `test_file`, one question in
    ten of `train_file` is a test question, by a hash of its text. `train_tasks` and `test_tasks` limit the questions; 0
    means all. `steering` is what a question of STEER-BENCH shows before it. `answer` is what of a reply is read, which
    the prompt says. With `tell_answer`, full feedback includes the right answer."""

    train_file: str = ""
    test_file: str = ""
    format: str = "questions"
    steering: str = "none"
    train_tasks: int = 0
    test_tasks: int = 0
    answer: AnswerFormat = AnswerFormat.AUTO
    tell_answer: bool = False
    name: str = "questions"

    def __post_init__(self) -> None:
        for setting, given, known in (("format", self.format, FORMATS), ("steering", self.steering, (*STEERING, ALL))):
            if given not in known:
                raise ValueError(f"{setting} must be one of {', '.join(known)}, not {given!r}")
        if self.steering != "none" and self.format != "steer-bench":
            raise ValueError('steering is for format = "steer-bench"')
        for setting, number in (("train_tasks", self.train_tasks), ("test_tasks", self.test_tasks)):
            if number < 0:
                raise ValueError(f"{setting} must be at least 0, not {number}")
        if self.format != "questions" and not (self.train_file or self.test_file):
            raise ValueError(f'format = "{self.format}" needs a train_file or a test_file')


class QuestionEpisode:
    """`accepted` are the right answers; none of an unanswerable question. `expected` is told to whom asks for it."""

    def __init__(
        self, observation: str, accepted: Sequence[str], choices: Sequence[str], expected: str, how: AnswerFormat
    ) -> None:
        self.observation = observation
        self._accepted = accepted
        self._choices = choices
        self._expected = expected
        self._how = how

    def step(self, action: str) -> StepResult:
        answer = read(action, self._accepted, self._choices, self._how)
        if is_right(answer, self._accepted):
            return StepResult(OVER, printable(answer, _SHOWN), 1.0, done=True, feedback="Correct.")
        shown = printable(answer, _SHOWN)
        feedback = f"Incorrect. Answer read: {shown}." if shown else f"Incorrect. {self._how.missing}"
        told = f" Expected: {self._expected}." if self._expected else ""
        return StepResult(OVER, shown or INVALID, done=True, feedback=feedback + told)

    def fork(self) -> QuestionEpisode:
        return copy(self)  # nothing in it changes


class Questions:
    """`entries` are the questions of each split by id. `left_out` counts those in the files that could not be used."""

    transformations = (FROM_DATA, NO_RIGHT_CHOICE)

    def __init__(
        self, entries: Mapping[Split, Mapping[str, QuestionEntry]], settings: Settings, left_out: int = 0
    ) -> None:
        self.settings = settings
        self._entries = {split: list(entries[split].values()) for split in Split}
        self._by_task = {f"{split}/{id_}": entry for split in Split for id_, entry in entries[split].items()}
        source = "from files" if settings.train_file or settings.test_file else "that come along"
        omitted = f"; {left_out} without a usable answer left out" if left_out else ""
        self.info = EnvironmentInfo(
            name=settings.name,
            description=f"Questions {source} ({settings.format}){omitted}",
            prompts=generic_prompts("Answer a question.", settings.answer.instruction or _FORMAT),
            max_steps=1,
            max_reward=1.0,
            deterministic=True,
            task_counts={split: len(self._entries[split]) for split in Split},
            can_fork=True,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        first = max(offset, 0)
        chosen = self._entries[split][first : first + max(limit, 0)]
        return [TaskInfo(f"{split}/{entry.id}", split, entry.difficulty, entry.tags) for entry in chosen]

    def start(self, task_id: str) -> QuestionEpisode:
        entry = self._find(task_id)
        # A refusal of a multiple choice is a text, not a letter.
        answers, choices = (entry.answers, entry.choices) if entry.answers else ((REFUSAL,), ())
        expected = " or ".join(answers) if self.settings.tell_answer else ""
        shown = _shown(entry, entry.question, entry.choices)
        return QuestionEpisode(shown, answers, choices, expected, self.settings.answer)

    def versions(self, split: Split, transformation: str) -> Sequence[Versions]:
        if transformation == FROM_DATA:
            return [entry.versions for entry in self._entries[split]]
        return [Versions.BOTH if entry.remaining_choices else entry.versions for entry in self._entries[split]]

    def start_unanswerable(self, task_id: str, transformation: str) -> QuestionEpisode:
        entry = self._find(task_id)
        if transformation == NO_RIGHT_CHOICE and entry.remaining_choices:
            text, choices = entry.question, entry.remaining_choices
        else:
            text, choices = entry.unanswerable, entry.choices
        if not text:
            raise UnknownTask(f"{task_id[:80]!r} of {self.info.name} has no version without an answer")
        return QuestionEpisode(_shown(entry, text, choices), (), choices, "", self.settings.answer)

    def _find(self, task_id: str) -> QuestionEntry:
        if task_id not in self._by_task:
            raise UnknownTask(f"{task_id[:80]!r} is not a task of {self.info.name}")
        return self._by_task[task_id]


def create(name: str, settings: Settings) -> Questions:
    """Reads the questions. Raises ValueError, which names the setting, or the file and line and what was expected, and
    MissingExtra for Parquet."""
    settings = replace(settings, name=name)
    own = not (settings.train_file or settings.test_file)
    train_file, test_file = ("train.jsonl", "test.jsonl") if own else (settings.train_file, settings.test_file)
    folder = f"{_HERE}/" if own else ""
    train, train_left_out = _read(settings, "train_file", folder + train_file if train_file else "")
    test, test_left_out = _read(settings, "test_file", folder + test_file if test_file else "")
    if test_file:
        train = without(train, test)
    else:
        test = [entry for entry in train if _is_test(entry)]
        train = [entry for entry in train if not _is_test(entry)]
    entries = {
        Split.TRAIN: _limited(train, settings.train_tasks),
        Split.TEST: _limited(test, settings.test_tasks),
    }
    return Questions(entries, settings, train_left_out + test_left_out)


def _read(settings: Settings, setting: str, path: str) -> tuple[list[QuestionEntry], int]:
    """The questions of the files, and how many were left out."""
    files = required(setting, path)
    if settings.format == "steer-bench":
        found, left_out = read_steer_bench(files, settings.steering)
    else:
        kinds = (OwnRow,) if settings.format == "questions" else (SumPair, SumTest)
        found, left_out = list(read_entries(files, kinds)), 0
    if files and not found:
        raise ValueError(f"{path}: no questions in it")
    return found, left_out


def _limited(entries: Iterable[QuestionEntry], limit: int) -> dict[str, QuestionEntry]:
    found = by_id(entries)
    return dict(list(found.items())[: limit or None])


def _is_test(entry: QuestionEntry) -> bool:
    """By the text alone: a question is in one split, whoever is asked."""
    return int(hashed(text_of(entry))[:15], 16) % TEST_SHARE == 0


def _shown(entry: QuestionEntry, text: str, choices: Sequence[str]) -> str:
    lettered = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return "\n\n".join(filter(None, (entry.context, f"{text}\n{lettered}" if lettered else text)))


_FORMAT = """\
Think first. Then put your final answer, and nothing else, in \\boxed{}: of a question with choices the letter, else \
the number or a few words. You have one attempt at it."""
