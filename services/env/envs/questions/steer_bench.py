"""STEER-BENCH's files (github.com/kaichen23/steer-bench): multiple choice, where the right answer depends on whose it
is, one of two communities with contrasting views.

The collection, `steer-bench.json`, has records of `{"subreddit_pair": "ONE_OTHER", "topic", "open_ended",
"closed_ended"}`. Both of the latter have `r/A` (of ONE) and `r/B` (of OTHER): lists of objects with one key each, an
instruction with its response, or a question, whose choices are lines of it, with its answer.
An evaluation file, such as `in_context_eval.json`, has records of `{"subreddit", "closed_ended_question", "answer"}`,
and `open_ended` or `instruction_pair`: a list of objects with instructions and responses.

"A/B" means that both are right, as in the published evaluation. A question whose answer names no letter ("Not
discussed") is left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mulligan.env.envs.questions.data import QuestionEntry, Text, hashed, read_rows
from mulligan.env.envs.questions.score import LETTERS

# What is shown before the question, the published configurations: vanilla, the community's name, pairs of instruction
# and response of the topic, both, pairs of other topics.
STEERING = ("none", "community", "examples", "both", "other_examples")
ALL = "all"  # of them: each question is a task in each
SHOTS = 12
_CHOICE = re.compile(r"\(?([A-Z])[.):]\s*(\S.*)")
_LABEL = re.compile(r"([A-Z])(?=$|[^\w'’\s]|\s+and\s+[A-Z]\b)(?:\s*(?:[/,]|and)\s*([A-Z])(?![\w'’]))*")
_MORE = re.compile(r"(?<![\w'’])[A-Z](?![\w'’])")
_SIDES = ("r/A", "r/B")
Pairs = list[dict[str, str]]


class Collected(BaseModel):
    subreddit_pair: Text
    topic: int | str
    open_ended: dict[str, Pairs]
    closed_ended: dict[str, Pairs]

    def communities(self, place: str) -> dict[str, str]:
        names = self.subreddit_pair.split("_")
        if len(names) != 2 or not all(names):
            raise ValueError(f"{place}: subreddit_pair: expected two names joined by _, not {self.subreddit_pair!r}")
        for field in ("open_ended", "closed_ended"):
            if unknown := sorted(set(getattr(self, field)) - set(_SIDES)):
                raise ValueError(f"{place}: {field}: expected r/A and r/B, not {unknown[0]!r}")
        return dict(zip(_SIDES, names, strict=True))


class Evaluated(BaseModel):
    subreddit: Text
    closed_ended_question: Text
    answer: Text
    open_ended: Pairs | None = None
    instruction_pair: Pairs | None = None


def read_steer_bench(files: Iterable[Path], steering: str) -> tuple[list[QuestionEntry], int]:
    """The questions, and how many were left out. Raises ValueError, which names file, record and field."""
    rows = list(read_rows(files, (Collected, Evaluated)))
    collected = _Collection(rows)
    found: list[QuestionEntry] = []
    left_out = 0
    contexts = STEERING if steering == ALL else (steering,)
    for place, row in rows:
        for versions in zip(*(_asked(place, row, collected, context) for context in contexts), strict=True):
            for context, (community, question, answer, pairs) in zip(contexts, versions, strict=True):
                entry = _entry(place, community, question, answer, _context(context, community, pairs))
                if entry is None:
                    left_out += 1
                    break  # in every context
                found.append(entry.shown_in(context) if steering == ALL else entry)
    return found, left_out


class _Collection:
    """All pairs of instruction and response: by community, then by topic."""

    def __init__(self, rows: Iterable[tuple[str, Any]]) -> None:
        self._of_topic: dict[tuple[str, str], Pairs] = defaultdict(list)
        for place, row in rows:
            if isinstance(row, Collected):
                for side, community in row.communities(place).items():
                    self._of_topic[community, _topic(row)] += row.open_ended.get(side, [])
        self._mixed: dict[str, list[tuple[str, dict[str, str]]]] = defaultdict(list)  # topic and pair, in a fixed order
        for (community, topic), pairs in self._of_topic.items():
            self._mixed[community] += [(topic, pair) for pair in pairs]
        for mixed in self._mixed.values():
            mixed.sort(key=lambda item: hashed(item[0], *item[1]))

    def of(self, community: str, topic: str) -> Pairs:
        return self._of_topic[community, topic]

    def others(self, community: str, topic: str, question: str) -> Pairs:
        """Pairs of other topics. A hash of the question decides where they begin."""
        mixed = self._mixed[community]
        start = int(hashed(question), 16)
        turned = (mixed[(start + index) % len(mixed)] for index in range(len(mixed)))
        return list(islice((pair for one, pair in turned if one != topic), SHOTS))


def _topic(row: Collected) -> str:
    return f"{row.subreddit_pair}/{row.topic}"


def _asked(
    place: str, row: Collected | Evaluated, collected: _Collection, steering: str
) -> Iterator[tuple[str, str, str, Pairs]]:
    """Community, question, answer and what is shown before, for each question of a record."""
    if isinstance(row, Evaluated):
        field = "instruction_pair" if steering == "other_examples" else "open_ended"
        shown: Pairs | None = getattr(row, field)
        if shown is None and _shows_examples(steering):
            raise ValueError(f"{place}: {field}: is missing; steering = {steering!r} shows it")
        yield row.subreddit, row.closed_ended_question, row.answer, shown or []
        return
    for side, community in row.communities(place).items():
        for asked in row.closed_ended.get(side, []):
            for question, answer in asked.items():
                pairs = collected.of(community, _topic(row))
                if steering == "other_examples":
                    pairs = collected.others(community, _topic(row), question)
                if not pairs and _shows_examples(steering):
                    raise ValueError(
                        f"{place}: open_ended: no pairs of r/{community} that steering = {steering!r} needs"
                    )
                yield community, question, answer, pairs


def _shows_examples(steering: str) -> bool:
    return steering not in ("none", "community")


def _entry(place: str, community: str, asked: str, answer: str, context: str) -> QuestionEntry | None:
    lines = [line.strip() for line in asked.splitlines() if line.strip()]
    found = [_CHOICE.fullmatch(line) for line in lines]
    first = next((index for index, match in enumerate(found) if match), len(lines))
    choices = [match for match in found[first:] if match]
    letters = "".join(match[1] for match in choices)
    right = tuple(letter for letter in _letters(answer) if letter in letters)
    question = " ".join(lines[:first])
    if not question or len(letters) < 2 or letters != LETTERS[: len(letters)] or not right:
        return None
    own = f"{community}-{hashed(community, asked)}"
    return QuestionEntry(own, place, question, right, tuple(match[2].strip() for match in choices), context)


def _letters(answer: str) -> list[str]:
    """The letters with which an answer begins: of "B", "B. Some text", "A/B", "A, C", "A and B; both"."""
    match = _LABEL.match(answer.strip())
    return _MORE.findall(match[0]) if match else []


def _context(steering: str, community: str, pairs: Pairs) -> str:
    name = f"Answer as the members of the community r/{community} would." if steering in ("community", "both") else ""
    if not _shows_examples(steering):
        return name
    shown = "\n\n".join(
        f"{number}. Question: {instruction}\nAnswer: {response}"
        for number, (instruction, response) in enumerate((item for pair in pairs for item in pair.items()), start=1)
    )
    told = "These answers of one community show how its members think. Choose what they would choose."
    return "\n\n".join(filter(None, (name, told, shown)))
