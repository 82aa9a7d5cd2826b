"""HotpotQA's files, as published (https://hotpotqa.github.io) and as the hub has them: questions with their paragraphs,
and Wikipedia's introductions for the fullwiki setting.

Questions (`hotpot_train_v1.1.json`, `hotpot_dev_distractor_v1.json`, `hotpot_dev_fullwiki_v1.json`): records of
`{"_id", "question", "answer", "type", "level", "supporting_facts": [[title, sentence]], "context": [[title,
[sentence]]]}`. The hub's have `id` for `_id`, and columns: `"context": {"title": [...], "sentences": [[...]]}`,
or as some libraries write the same, `[{"title", "sentences"}]`.
Introductions (`enwiki-20171001-pages-meta-current-withlinks-abstracts`): folders of bzip2 files with a JSON object
`{"title", "text": [sentence]}` a line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from mulligan.env.files import matching, required
from mulligan.env.record_files import read_records

LEVELS = {"easy": 1.0, "medium": 2.0, "hard": 3.0}
MAX_ID = 190  # characters; a task's id, with its split before it, may have 200
_CHUNK = 2**20


class Question(msgspec.Struct, frozen=True):
    """One record of a question file, with the fields that the environment uses."""

    question: str
    official_id: str | int | None = msgspec.field(name="_id", default="")
    hub_id: str | int | None = msgspec.field(name="id", default="")
    known_answer: str | None = msgspec.field(name="answer", default=None)  # the test set has none
    level: str | None = "hard"  # the official development sets are

    @property
    def id(self) -> str:
        """The record's own id, or the beginning of the SHA-256 of the question."""
        own = next((str(given) for given in (self.official_id, self.hub_id) if given not in ("", None)), "")
        return own or hashlib.sha256(self.question.encode()).hexdigest()[:24]

    @property
    def answer(self) -> str:
        return self.known_answer or ""

    @property
    def difficulty(self) -> float:
        return LEVELS.get(self.level or "", LEVELS["hard"])


class _Columns(msgspec.Struct):
    title: list[str]
    sentences: list[list[str]]


class _Paragraph(msgspec.Struct):
    title: str
    sentences: list[str]


class _Page(msgspec.Struct):
    """A source of passages: a question's context, or an introduction."""

    context: list[tuple[str, list[str]] | _Paragraph] | _Columns | None = None
    title: str | None = None
    text: str | list[str | list[str]] | None = None  # whole, sentences, or paragraphs of sentences

    def passages(self, place: str) -> Iterator[tuple[str, str]]:
        if self.title is not None and self.text is not None:
            yield self.title, (self.text if isinstance(self.text, str) else "".join(map("".join, self.text))).strip()
        elif isinstance(self.context, list):
            for one in self.context:
                title, sentences = (one.title, one.sentences) if isinstance(one, _Paragraph) else one
                yield title, "".join(sentences).strip()
        elif self.context is not None:
            titles = self.context.title
            texts = self.context.sentences
            if len(titles) != len(texts):
                raise ValueError(
                    f"{place}: context: {len(titles)} in `title` and {len(texts)} in `sentences`; expected as many"
                )
            yield from ((title, "".join(sentences).strip()) for title, sentences in zip(titles, texts, strict=True))


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a data set. An empty path means that there is no such file."""

    train_file: str = ""
    test_file: str = ""
    corpus: tuple[str, ...] = ()

    def questions(self, path: str, limit: int) -> tuple[Question, ...]:
        """The first `limit` questions of a file; 0 means all. Raises ValueError that names the file and the record."""
        read = (record for file in matching(path) for record in read_records(file, Question))
        found = []
        for place, question in islice(read, limit or None):
            if not question.question.strip() or not question.answer.strip():
                raise ValueError(f"{place} has no question or no answer; the official test set has none")
            if len(question.id) > MAX_ID:
                raise ValueError(f"{place}: its id has {len(question.id)} characters; expected at most {MAX_ID}")
            found.append(question)
        if path and not found:
            raise ValueError(f"{path}: no records; expected questions")
        return tuple(found)

    def passages(self) -> Iterator[tuple[str, str]]:
        """Title and text of every paragraph in the question files and the corpus, each once, in the order of the
        files."""
        seen: set[bytes] = set()
        for title, text in self._paragraphs():
            key = hashlib.blake2b(f"{title}\n{text}".encode(), digest_size=8).digest()
            if key not in seen:
                seen.add(key)
                yield title, text

    def fingerprint(self) -> str:
        """A hash of the content of all files that have passages."""
        digest = hashlib.sha256()
        for path in self._sources():
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
            digest.update(b"\0")
        return digest.hexdigest()

    def check(self) -> None:
        """Raises ValueError if a file does not exist."""
        for setting, path in (("train_file", self.train_file), ("test_file", self.test_file)):
            required(setting, path)
        for path in self.corpus:
            if not Path(path).exists() and not matching(path):
                raise ValueError(f"corpus: no such file or folder: {path}")

    def _sources(self) -> list[Path]:
        files = matching(self.train_file) + matching(self.test_file)
        for path in self.corpus:
            folder = Path(path)
            found = (one for one in folder.rglob("*") if one.is_file())
            files += sorted(found) if folder.is_dir() else matching(path)
        return files

    def _paragraphs(self) -> Iterator[tuple[str, str]]:
        questions = {*matching(self.train_file), *matching(self.test_file)}
        for path in self._sources():
            for place, page in read_records(path, _Page):
                if path not in questions and page.context is None and (page.title is None or page.text is None):
                    raise ValueError(f"{place}: expected `title` and `text`, or a question's `context`")
                yield from ((title, text) for title, text in page.passages(place) if text)


def by_id(questions: Iterable[Question], without: Iterable[Question] = ()) -> dict[str, Question]:
    """The questions by id, in order, without those that are also in `without`. Raises ValueError if an id occurs
    twice."""
    asked = {_plain(question) for question in without}
    found: dict[str, Question] = {}
    for question in questions:
        if question.id in found:
            raise ValueError(f"the question id {question.id!r} is there twice")
        if _plain(question) not in asked:
            found[question.id] = question
    return found


def _plain(question: Question) -> str:
    return " ".join(question.question.casefold().split())
