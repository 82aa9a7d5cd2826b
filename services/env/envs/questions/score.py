"""Reads and compares answers.

- An answer that is a number is compared as a number: 1,234 and 1234.0, 0.5 and 1/2 are equal.
- A formula, such as x^2 + 1 or (3, 4), is compared as it is written, apart from white space and LaTeX's spacing.
- Words are compared as HotpotQA's `hotpot_evaluate_v1.py` does: lower case, without punctuation and articles.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from fractions import Fraction

from mulligan.common.thoughts import without_thoughts
from mulligan.env.answers import (
    AnswerFormat,
    last_letter,
    marked,
    normalize,
    one_value,
    read_answer,
    stated_value,
    values,
)

LETTERS = string.ascii_uppercase
MAX_CHOICES = len(LETTERS)
_MAX_NUMBER = 100  # characters of a number; a longer one is compared as text
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
_FRACTION = re.compile(r"([-+]?[0-9]+)/([0-9]+)")
_UNIT = re.compile(r"^\\?[$€£]\s*|\s*\\?[$€£%]$")
_LATEX_SPACE = re.compile(r"\\(?:left|right|displaystyle|quad|[,;!: ])|\s")
_LATEX_WORDS = re.compile(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}")
_COMMANDS = re.compile(r"\\[A-Za-z]+")
_SIGNS = re.compile(r"[0-9\\^_{}=+*/<>|()\[\]\u221a\u03c0]")
_WORD = re.compile(r"[^\W\d_]{2,}")
_LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.):,]|\s*$)")


def read(
    reply: str, accepted: Sequence[str], choices: Sequence[str] = (), how: AnswerFormat = AnswerFormat.AUTO
) -> str:
    """What the reply answers, in the format `how`: the letter of a choice, or a text; "" if it answers nothing. The
    values of `accepted` have no influence, only whether the first one is a number. Without choices, the format `choice`
    reads the last line."""
    if choices:
        return _read_choice(reply, choices, how)
    if how is AnswerFormat.CHOICE:
        how = AnswerFormat.LINE
    if not accepted or number(accepted[0]) is None:
        return read_answer(reply, how=how)
    return _read_number(reply, how)


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer equals one of `accepted`."""
    return any(_equal(answer, one) for one in accepted)


def number(text: str) -> Fraction | None:
    """The value of a text that is one number or fraction, with or without thousands separators, % or a currency."""
    if len(text) > _MAX_NUMBER:
        return None
    found = one_value(_UNIT.sub("", text.strip().removesuffix(".")))
    if fraction := _FRACTION.fullmatch(found):
        below = int(fraction[2])
        return Fraction(int(fraction[1]), below) if below else None
    return Fraction(found) if _NUMBER.fullmatch(found) else None


def plain_words(text: str) -> str:
    """As `normalize`, and the typographic apostrophe is the other one."""
    return normalize(text.replace("\u2019", "'"))


def _equal(answer: str, right: str) -> bool:
    expected = number(right)
    if expected is not None:
        return number(answer) == expected
    if _is_formula(right):
        return _formula(answer) == _formula(right)
    words = plain_words(right)
    return plain_words(answer) == words if words else answer.strip().casefold() == right.strip().casefold()


def _is_formula(text: str) -> bool:
    """Whether it has digits or mathematical signs and no words."""
    unwrapped = _LATEX_WORDS.sub(r"\1", text)
    return _SIGNS.search(unwrapped) is not None and _WORD.search(_COMMANDS.sub(" ", unwrapped)) is None


def _formula(text: str) -> str:
    unwrapped = _LATEX_WORDS.sub(r"\1", text).strip().strip("$").removesuffix(".")
    plain = _LATEX_SPACE.sub("", unwrapped.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    return plain.replace("\u2212", "-")


def _read_number(reply: str, how: AnswerFormat) -> str:
    """The number of an answer with marks or a line of its own, if there is just one after its last `=`. Else, with
    `auto`, the one that the reply says its answer is; else the last number."""
    found = marked(reply) if how is AnswerFormat.AUTO else read_answer(reply, how=how)
    if found is None and how is AnswerFormat.AUTO:
        return stated_value(without_thoughts(reply))
    if found is None or how is AnswerFormat.LAST_NUMBER:
        said = values(without_thoughts(reply))
        return said[-1] if said else ""
    said = values(found.rpartition("=")[2])
    return said[0] if len(said) == 1 else found


def _read_choice(reply: str, choices: Sequence[str], how: AnswerFormat) -> str:
    """The letter in what the format reads: alone, or before its choice. The text of a choice counts as its letter. With
    `auto` it is the marked answer, else the last line, else the first."""
    letters = LETTERS[: len(choices)]
    if how is AnswerFormat.CHOICE:
        return last_letter(without_thoughts(reply), letters)
    lines = without_thoughts(reply).strip().splitlines()
    first = how is AnswerFormat.AUTO and bool(lines) and marked(reply) is None
    for text in (read_answer(reply, how=how), lines[0].strip(" *_") if first else ""):
        letter = _LETTER.match(text)
        if letter is not None and letter[1].upper() in letters:
            return letter[1].upper()
        words = plain_words(text)
        same = [index for index, choice in enumerate(choices) if words and plain_words(choice) == words]
        if len(same) == 1:
            return LETTERS[same[0]]
    return ""
