"""HotpotQA's files as published (https://hotpotqa.github.io): questions with their paragraphs, and Wikipedia's
introductions for the fullwiki setting.

Questions (`hotpot_train_v1.1.json`, `hotpot_dev_distractor_v1.json`, `hotpot_dev_fullwiki_v1.json`): a JSON array of
`{"_id", "question", "answer", "type", "level", "supporting_facts": [[title, sentence]], "context": [[title,
[sentence]]]}`. Introductions (`enwiki-20171001-pages-meta-current-withlinks-abstracts`): folders of bzip2 files with a
JSON object `{"title", "text": [sentence]}` a line.
"""

from __future__ import annotations

import bz2
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

LEVELS = {"easy": 1.0, "medium": 2.0, "hard": 3.0}
_CHUNK = 2**20
T = TypeVar("T")


class Question(msgspec.Struct, frozen=True):
    """One record of a question file; what the environment does not use is left out. The test set has no answers."""

    id: str = msgspec.field(name="_id")
    question: str
    answer: str = ""
    type: str = ""
    level: str = "hard"  # the official development sets are

    @property
    def difficulty(self) -> float:
        return LEVELS.get(self.level, LEVELS["hard"])


class _Context(msgspec.Struct):
    context: list[tuple[str, list[str]]] = []


class _Abstract(msgspec.Struct):
    title: str
    text: str | list[str | list[str]]  # whole, sentences, or paragraphs of sentences


@dataclass(frozen=True, slots=True)
class Files:
    """What a data set is read from. An empty path is none."""

    train_file: str = ""
    test_file: str = ""
    corpus: tuple[str, ...] = ()

    def questions(self, path: str, limit: int) -> tuple[Question, ...]:
        """The first `limit` ones of a file, 0 for all. Raises ValueError that names the file and the record."""
        if not path:
            return ()
        raw = _array(path)
        found = tuple(_record(path, index, item, Question) for index, item in enumerate(raw[: limit or None]))
        for index, question in enumerate(found):
            if not question.question.strip() or not question.answer.strip():
                raise ValueError(f"{path}: record {index} has no question or no answer; the official test set has none")
        return found

    def passages(self) -> Iterator[tuple[str, str]]:
        """(title, text) of every paragraph in the question files and the corpus, each once, in the files' order."""
        seen: set[bytes] = set()
        for title, text in self._paragraphs():
            key = hashlib.blake2b(f"{title}\n{text}".encode(), digest_size=8).digest()
            if key not in seen:
                seen.add(key)
                yield title, text

    def fingerprint(self) -> str:
        """Of the content of all files that passages come from."""
        digest = hashlib.sha256()
        for path in self._sources():
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
            digest.update(b"\0")
        return digest.hexdigest()

    def check(self) -> None:
        """Raises ValueError when a file is not there."""
        for setting, path in (("train_file", self.train_file), ("test_file", self.test_file)):
            if path and not Path(path).is_file():
                raise ValueError(f"{setting}: no such file: {path}")
        for path in self.corpus:
            if not Path(path).exists():
                raise ValueError(f"corpus: no such file or folder: {path}")

    def _sources(self) -> list[Path]:
        files = [Path(path) for path in (self.train_file, self.test_file) if path]
        for path in map(Path, self.corpus):
            files += sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]
        return files

    def _paragraphs(self) -> Iterator[tuple[str, str]]:
        for path in self._sources():
            if str(path) in (self.train_file, self.test_file) or path.suffix == ".json":
                yield from _contexts(str(path))
            else:
                yield from _abstracts(path)


def _array(path: str) -> list[msgspec.Raw]:
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=list[msgspec.Raw])
    except (msgspec.DecodeError, OSError) as error:
        raise ValueError(f"{path}: not a JSON array of questions: {error}") from error


def _record(path: str, index: int, raw: msgspec.Raw, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: record {index}: {error}") from error


def _contexts(path: str) -> Iterator[tuple[str, str]]:
    for index, raw in enumerate(_array(path)):
        for title, sentences in _record(path, index, raw, _Context).context:
            yield title, "".join(sentences).strip()


def _abstracts(path: Path) -> Iterator[tuple[str, str]]:
    decoder = msgspec.json.Decoder(_Abstract)
    with bz2.open(path, "rb") if path.suffix == ".bz2" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                page = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            text = page.text if isinstance(page.text, str) else "".join(map("".join, page.text))
            if text.strip():
                yield page.title, text.strip()


def by_id(questions: Iterable[Question], without: Iterable[Question] = ()) -> dict[str, Question]:
    """The questions under their ids, in order; those that are asked in `without`, too, are left out. Raises ValueError
    when an id is there twice."""
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
