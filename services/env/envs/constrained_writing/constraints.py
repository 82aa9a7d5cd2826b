"""Rules for a sentence: what the task says of each, and what is wrong with a sentence that breaks it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

LEAST_WORDS = 3  # of a sentence
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_QUOTES = "\"'“”‘’*_` "
_ENDS = ".!?"
_NEXT_SENTENCE = re.compile(r"[.!?][\"'”’)]*\s+\S")
# Letters that a task may forbid, and letters that it may ask a sentence to begin with. None is in both: a task may have
# both rules.
_FORBIDDEN = "aeinorst"
_BEGINNINGS = "bcdfghlmpw"

# Given a sentence, says what is wrong with it, as a sentence; "" if nothing is.
Check = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class WritingRule:
    """`request` is the rule as a sentence of the task."""

    request: str
    problem: Check


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


def at_most(limit: int) -> Check:
    """A sentence has at most `limit` words."""

    def problem(sentence: str) -> str:
        count = len(words_of(sentence))
        return f"{_counted(count)}; at most {limit} are allowed." if count > limit else ""

    return problem


def includes(word: str) -> Check:
    """A sentence has the word, which is in lower case, in this form."""
    return lambda sentence: "" if word in words_of(sentence) else f'The word "{word}" is missing.'


def without_letter(letter: str) -> WritingRule:
    def problem(sentence: str) -> str:
        bad = next((word for word in words_of(sentence) if letter in word), "")
        return f'The word "{bad}" has the letter "{letter}".' if bad else ""

    return WritingRule(f'Do not use the letter "{letter}".', problem)


def begins_with(letter: str) -> WritingRule:
    def problem(sentence: str) -> str:
        begins = sentence[:1].casefold() == letter
        return "" if begins else f'It begins with "{sentence[:1]}", not with "{letter.upper()}".'

    return WritingRule(f'Begin with the letter "{letter.upper()}".', problem)


def _capital(sentence: str) -> str:
    bad = next((character for character in sentence if character.isupper()), "")
    return f'It has the capital letter "{bad}".' if bad else ""


LOWER_CASE = WritingRule("Use no capital letters.", _capital)
QUESTION = WritingRule(
    "Make it a question.",
    lambda sentence: "" if sentence.endswith("?") else "It does not end with a question mark.",
)
NO_COMMAS = WritingRule("Use no commas.", lambda sentence: "It has a comma." if "," in sentence else "")

# The further rules that a task may have, by name: each is drawn given the words that the sentence must have.
FURTHER: Mapping[str, Callable[[Sequence[str], random.Random], WritingRule]] = {
    "without_letter": lambda given, rng: without_letter(
        rng.choice(sorted(set(_FORBIDDEN) - set("".join(given))) or "z")
    ),
    "begins_with": lambda given, rng: begins_with(rng.choice(_BEGINNINGS)),
    "lower_case": lambda given, rng: LOWER_CASE,
    "question": lambda given, rng: QUESTION,
    "no_commas": lambda given, rng: NO_COMMAS,
}
