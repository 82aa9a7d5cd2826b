"""What a sentence must be like, and what is wrong with one: each constraint has both in words."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

LEAST_WORDS = 3  # of a sentence
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_QUOTES = "\"'“”‘’*_` "
_ENDS = ".!?"
_NEXT_SENTENCE = re.compile(r"[.!?][\"'”’)]*\s+\S")


class WritingRule(Protocol):
    @property
    def request(self) -> str:
        """The constraint as a sentence of the task."""

    def problem(self, sentence: str) -> str:
        """What is wrong with a sentence, as a sentence; "" if it keeps the constraint."""


def words_of(sentence: str) -> list[str]:
    """The words in lower case. A word with an apostrophe or a hyphen is one."""
    return _WORD.findall(sentence.casefold().replace("’", "'"))


def sentence_of(answer: str) -> str:
    """The answer without white space, quotation marks and marks of emphasis around it."""
    return answer.strip().strip(_QUOTES)


def no_sentence(sentence: str) -> str:
    """Why a text is not one sentence, as a sentence; "" if it is one. Grammar is not checked."""
    words = words_of(sentence)
    if len(words) < LEAST_WORDS:
        return f"{_counted(len(words))}; a sentence has at least {LEAST_WORDS}."
    if "\n" in sentence:
        return "It has more than one line."
    if _NEXT_SENTENCE.search(sentence):
        return "It is more than one sentence."
    if sentence[-1] not in _ENDS:
        return "The sentence has no end: no full stop, question mark or exclamation mark."
    twice = next((one for one, other in pairwise(words) if one == other), "")
    return f'The word "{twice}" stands twice in a row.' if twice else ""


def _counted(count: int) -> str:
    return f"It has {count} word{'' if count == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class AtMost:
    """A number of words that the sentence may have."""

    limit: int

    @property
    def request(self) -> str:
        return f"Use at most {self.limit} words."

    def problem(self, sentence: str) -> str:
        count = len(words_of(sentence))
        return f"{_counted(count)}; at most {self.limit} are allowed." if count > self.limit else ""


@dataclass(frozen=True, slots=True)
class Includes:
    """A word, in lower case, that the sentence must have in this form."""

    word: str

    @property
    def request(self) -> str:
        return f'Use the word "{self.word}".'

    def problem(self, sentence: str) -> str:
        return "" if self.word in words_of(sentence) else f'The word "{self.word}" is missing.'


@dataclass(frozen=True, slots=True)
class WithoutLetter:
    letter: str

    @property
    def request(self) -> str:
        return f'Do not use the letter "{self.letter}".'

    def problem(self, sentence: str) -> str:
        bad = next((word for word in words_of(sentence) if self.letter in word), "")
        return f'The word "{bad}" has the letter "{self.letter}".' if bad else ""


@dataclass(frozen=True, slots=True)
class BeginsWith:
    letter: str

    @property
    def request(self) -> str:
        return f'Begin with the letter "{self.letter.upper()}".'

    def problem(self, sentence: str) -> str:
        first = sentence[:1]
        begins = first.casefold() == self.letter
        return "" if begins else f'It begins with "{first}", not with "{self.letter.upper()}".'


@dataclass(frozen=True, slots=True)
class LowerCase:
    request: str = "Use no capital letters."

    def problem(self, sentence: str) -> str:
        bad = next((character for character in sentence if character.isupper()), "")
        return f'It has the capital letter "{bad}".' if bad else ""


@dataclass(frozen=True, slots=True)
class IsQuestion:
    request: str = "Make it a question."

    def problem(self, sentence: str) -> str:
        return "" if sentence.endswith("?") else "It does not end with a question mark."


@dataclass(frozen=True, slots=True)
class NoCommas:
    request: str = "Use no commas."

    def problem(self, sentence: str) -> str:
        return "It has a comma." if "," in sentence else ""


def _without_letter(given: Sequence[str], rng: random.Random) -> WritingRule:
    free = sorted(set("aeinorst") - set("".join(given))) or ["z"]
    return WithoutLetter(rng.choice(free))


def _begins_with(given: Sequence[str], rng: random.Random) -> WritingRule:
    return BeginsWith(rng.choice("abcdefghilmnoprstw"))


# The further constraints that a task may have, by name: each is drawn given the words that the sentence must have.
FURTHER: Mapping[str, Callable[[Sequence[str], random.Random], WritingRule]] = {
    "without_letter": _without_letter,
    "begins_with": _begins_with,
    "lower_case": lambda given, rng: LowerCase(),
    "question": lambda given, rng: IsQuestion(),
    "no_commas": lambda given, rng: NoCommas(),
}
