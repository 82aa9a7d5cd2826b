"""Files of questions, in three formats. Files are read as JSON lines, a JSON array or Parquet, by their content.

`questions`, this project's own: `{"question", "answer"}`, and optionally `choices` (texts; `answer` is then a letter or
one of them), `context` (shown before the question), `unanswerable` (a version of the question without an answer), `id`
and `difficulty`. `answer` may be a list: each of them is right. A record may have `unanswerable` alone.

`sum`, Synthetic Unanswerable Math (arXiv 2505.13988; `lime-nlp/Synthetic_Unanswerable_Math` on the hub): records of
`{"answerable_question", "unanswerable_question", "ground_truth"}`, as in its training file, or of
`{"prompt", "ground_truth"}`, as in its test file, where all are unanswerable and `ground_truth` says "I don't know.".

`steer-bench`, STEER-BENCH (arXiv 2505.20645; github.com/kaichen23/steer-bench): `steer_bench.py`.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from mulligan.common.suggest import did_you_mean, problems
from mulligan.env.base import Versions
from mulligan.env.envs.questions.score import LETTERS, MAX_CHOICES, plain_words
from mulligan.env.record_files import read_records

REFUSAL = "I don't know."  # SUM's answer to what has none
MAX_ID = 180  # characters; with its split and a version it may have 200
_SHOWN = 200  # characters of a record's names that an error shows
_MISSING = "Field required"


@dataclass(frozen=True, slots=True)
class QuestionEntry:
    """One question. `answers` are all that are right: of a multiple choice, letters. They are empty if the question has
    an unanswerable version alone. `unanswerable` is empty if there is none."""

    id: str
    place: str  # file and line, for errors
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    context: str = ""
    unanswerable: str = ""
    difficulty: float = 1.0
    steering: str = ""  # in which of several contexts it is shown, "" where there is one; the id ends with it

    def shown_in(self, steering: str) -> QuestionEntry:
        """The question in one of several contexts."""
        return replace(self, id=f"{self.id}/{steering}", steering=steering)

    @property
    def tags(self) -> dict[str, str]:
        """Of its task: what evaluations may know of it."""
        tags = {"answerable": str(bool(self.answers)).lower()}
        if self.choices and self.answers:
            tags["choices"] = str(len(self.choices))
        if self.steering:
            tags |= {"context": self.steering, "question": self.id.removesuffix(f"/{self.steering}")}
        return tags

    @property
    def versions(self) -> Versions:
        found = Versions(0)
        if self.answers:
            found |= Versions.ANSWERABLE
        if self.unanswerable:
            found |= Versions.UNANSWERABLE
        return found

    @property
    def remaining_choices(self) -> tuple[str, ...]:
        """The choices without the right ones; empty if fewer than two remain."""
        wrong = tuple(
            choice for letter, choice in zip(LETTERS, self.choices, strict=False) if letter not in self.answers
        )
        return wrong if len(wrong) > 1 else ()


class Row(Protocol):
    """A record of a format that needs no other records."""

    def entry(self, place: str) -> QuestionEntry: ...


def _texts(value: object) -> tuple[str, ...]:
    found = value if isinstance(value, list | tuple) else [value]
    if not found or not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in found):
        raise PydanticCustomError("answer", "expected a text, a number or a list of these")
    texts = tuple(str(one).strip() for one in found)
    if not all(texts):
        raise PydanticCustomError("answer", "expected no empty text")
    return texts


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise PydanticCustomError("text", "expected a text that is not empty")
    return value.strip()


Text = Annotated[str, BeforeValidator(_text)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class OwnRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    question: Text | None = None
    answer: Texts | None = None
    choices: list[Text] = Field([], max_length=MAX_CHOICES)
    context: str = ""
    unanswerable: Text | None = None
    id: str | int = ""
    difficulty: float = Field(1.0, allow_inf_nan=False)

    def entry(self, place: str) -> QuestionEntry:
        if self.question is None and self.unanswerable is None:
            raise ValueError(f"{place}: question: is missing; expected `question` with `answer`, or `unanswerable`")
        if (self.question is None) != (self.answer is None):
            missing, there = ("answer", "question") if self.answer is None else ("question", "answer")
            raise ValueError(f"{place}: {missing}: is missing; expected `{missing}` with `{there}`")
        if len(self.choices) == 1 or len({plain_words(choice) for choice in self.choices}) < len(self.choices):
            raise ValueError(f"{place}: choices: expected two or more that differ")
        question = self.question or self.unanswerable or ""
        answers = tuple(self._letter(place, answer) for answer in self.answer or ())
        own = str(self.id) or hashed(self.context, question, *self.choices)
        return QuestionEntry(
            own,
            place,
            question,
            answers,
            tuple(self.choices),
            self.context.strip(),
            self.unanswerable or "",
            self.difficulty,
        )

    def _letter(self, place: str, answer: str) -> str:
        letters = LETTERS[: len(self.choices)]
        if not self.choices or (len(answer) == 1 and answer in letters):
            return answer
        if answer in self.choices:
            return letters[self.choices.index(answer)]
        near = did_you_mean(answer, self.choices)
        raise ValueError(
            f"{place}: answer: expected a letter from A to {letters[-1]} or a choice, not {answer[:80]!r}{near}"
        )


class SumPair(BaseModel):
    answerable_question: Text
    unanswerable_question: Text
    ground_truth: Texts

    def entry(self, place: str) -> QuestionEntry:
        own = hashed(self.answerable_question, self.unanswerable_question)
        return QuestionEntry(
            own, place, self.answerable_question, self.ground_truth, unanswerable=self.unanswerable_question
        )


def _prompt(value: object) -> str:
    """The text of a prompt, which may be a list of one message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return _text(value)


class SumTest(BaseModel):
    prompt: Annotated[str, BeforeValidator(_prompt)]
    ground_truth: Texts

    def entry(self, place: str) -> QuestionEntry:
        if tuple(map(plain_words, self.ground_truth)) != (plain_words(REFUSAL),):
            raise ValueError(f"{place}: ground_truth: expected {REFUSAL!r}, as in SUM's test file")
        return QuestionEntry(hashed(self.prompt), place, self.prompt, (), unanswerable=self.prompt)


def read_entries(files: Iterable[Path], rows: Sequence[type[Row]]) -> Iterator[QuestionEntry]:
    """Reads files whose records are of these kinds. Raises ValueError, which names file, line, field and what was
    expected, and MissingExtra."""
    for place, row in read_rows(files, rows):
        yield row.entry(place)


def read_rows(files: Iterable[Path], kinds: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """As `read_entries`, but the rows with their places. A record is of the kind with which it shares most fields."""
    for file in files:
        for place, record in read_records(file, dict):
            kind = max(kinds, key=lambda kind: len(set(kind.model_fields) & set(record)))
            try:
                yield place, kind.model_validate(record)
            except ValidationError as error:
                raise ValueError(f"{place}: {_said(error, kind, record)}") from error


def _said(error: ValidationError, kind: type[BaseModel], record: Mapping[str, Any]) -> str:
    """The first problem of a record. A field that is missing may only be misspelt."""
    name, said = next(iter(problems(error, kind).items()))
    said = said.replace("setting", "field")
    if said == _MISSING:
        others = sorted(map(str, set(record) - set(kind.model_fields)))
        near = did_you_mean(name, others)
        there = ", ".join(map(str, record))[:_SHOWN]
        said = f"is missing{near}; the record has: {there}"
    return f"{name}: {said}"


def hashed(*texts: str) -> str:
    """An id: the beginning of the SHA-256 of the texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:24]


def by_id(entries: Iterable[QuestionEntry]) -> dict[str, QuestionEntry]:
    """The questions by id, in order. A question that occurs twice is one. Raises ValueError for an id of two."""
    found: dict[str, QuestionEntry] = {}
    for entry in entries:
        if not entry.id or len(entry.id) > MAX_ID:
            raise ValueError(f"{entry.place}: id: expected 1 to {MAX_ID} characters, not {len(entry.id)}")
        first = found.setdefault(entry.id, entry)
        if (first.context, first.question, first.choices) != (entry.context, entry.question, entry.choices):
            raise ValueError(f"{entry.place}: id: {entry.id!r} is also the id of {first.place}")
    return found


def without(entries: Iterable[QuestionEntry], taken: Iterable[QuestionEntry]) -> list[QuestionEntry]:
    """The questions of which neither version is among those taken, nor the beginning of one: SUM's test file adds an
    instruction to its questions."""
    texts = sorted({text for entry in taken for text in _versions(entry)})

    def is_taken(text: str) -> bool:
        at = bisect_left(texts, text)
        return at < len(texts) and texts[at].startswith(text) and not texts[at][len(text) : len(text) + 1].isalnum()

    return [entry for entry in entries if not any(map(is_taken, _versions(entry)))]


def text_of(entry: QuestionEntry) -> str:
    """The question without regard to case and white space."""
    return " ".join(entry.question.casefold().split())


def _versions(entry: QuestionEntry) -> list[str]:
    both = (text_of(entry), " ".join(entry.unanswerable.casefold().split()))
    return [text for text in both if text]
