r"""Finds the final answer in an agent's text, in one of several formats (`AnswerFormat`). Thoughts are ignored. Time is
linear in the length of hostile text."""

from __future__ import annotations

import re
import string
from enum import StrEnum

from mulligan.common.thoughts import without_thoughts

MAX_BOXED = 1_000  # characters
_FENCE = "```"
_BOX = "\\boxed{"
_MARKS = re.compile(r"<(?P<closes>/)?answer>", re.IGNORECASE)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}")
_LEAD = re.compile(r"\banswer[*_]*(?:[ ]is\b[ ]?:?|[ ]?[:=])", re.IGNORECASE)
# What may stand before "answer is" in its sentence where other lines follow: "To find the answer: …" says none.
_OPENING = re.compile(
    r"(?:^|[.!?:;][*_\"]*\s+)\W*(?:(?:so|thus|hence|then|therefore)\b,?\s)?(?:I\s\w+\s(?:that\s)?)?"
    r"(?:(?:the|my|our)\s)?(?:(?:final|correct|right)\s)?\W*$",
    re.IGNORECASE,
)
_OPENING_LENGTH = 60
# How what is said to be the answer begins if that is a number; else the last number is read.
_NUMBER_COMES = re.compile(
    r"\W*(?:(?:about|approximately|roughly|exactly|just|only|equal to)\W+)?(?:[A-Za-z]\w*[ ]?=\W*)?[0-9]", re.IGNORECASE
)
# How a line may begin that says the answer in other words; read in the last line alone.
_BEGIN = re.compile(
    r"\W*(?:(?:so|thus|hence|then|therefore)\b,?[ ])?"
    r"(?:(?:it|this|that|the[ ](?:result|solution|output))[ ](?:is\b|=)|(?:it|that)['’]s\b)[ ]?:?",
    re.IGNORECASE,
)
# What stands around a number that is said to be the answer: "So 8 is the answer to 4 + 4."
_TRAIL_BEGIN = re.compile(r"\W*(?:(?:so|thus|hence|then|therefore)\b,?[ ])?\W*", re.IGNORECASE)
_TRAIL = re.compile(
    r"[*_`$]{0,3}[ ]is[ ](?:the|my|our)[ ](?:(?:final|correct|right)[ ])?answer\b[^.!?\n]*[.!?]?\W*\Z", re.IGNORECASE
)
# What stands between two numbers that are no single one: 3 + 5, 16/8, 8 or 9.
_OPERATOR = r"[ ]?(?:[-+*/^\u00d7\u00b7\u00f7\u2212\u2013]|\bor\b)[ ]?[(]?"
_GOES_ON = re.compile(rf"{_OPERATOR}[-+\u2212]?[$€£]?[0-9]")
_GOES_BEFORE = re.compile(rf"[0-9)]{_OPERATOR}[-+\u2212]?[$€£]?\Z")
_SIGNS = "-+\u2212\u2013"
_BEFORE_LENGTH = 8
_SENTENCE = re.compile(r"(?<=[.!?])[*_\"]*\s")  # the end of one, with another behind it
_EQUALS = re.compile(r"(?<![=<>!:])=(?!=)")
_EDGES = ' *_`$"'  # marks around an answer
# 1,234.5 is one number, and 1,2 are two. A minus after a digit or a bracket is a subtraction.
_DIGITS = r"(?:[0-9]{1,3}(?:[,'’_\u00a0\u202f][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# Between a sign and its number there may be a currency, and a space if only a sign can stand there: "= - 8".
_CURRENCY = r"(?:\\?[$€£])?"
_SIGN = (
    rf"(?:(?<![^\W_])(?<![)\]}}])[-+\u2212\u2013]{_CURRENCY}"
    rf"|(?:(?<==)|(?<==[ ])|(?<=[(\[{{]))[-+\u2212\u2013][ ]{_CURRENCY})?"
)
_NUMBER = re.compile(rf"{_SIGN}(?<![^\W_])(?<![0-9]\.)(?:{_DIGITS})(?:[eE][-+]?[0-9]+)?(?![0-9])")
_FRACTION = re.compile(rf"{_SIGN}(?<![^\W_])[0-9]+[ ]?/[ ]?[0-9]+")
_HEX = re.compile(rf"{_SIGN}(?<![^\W_])0[xX][0-9a-fA-F]+(?![^\W_])")
_VALUE = re.compile(f"{_FRACTION.pattern}|{_NUMBER.pattern}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PLAIN = str.maketrans({**dict.fromkeys(",'’_\u00a0\u202f \\$€£"), "\u2212": "-", "\u2013": "-"})
# A letter that stands for a choice: in brackets, before a mark or the end of its line, or after a word such as
# "answer". So the article in "A cow" is none.
_LETTER = re.compile(
    r"\((?P<bracketed>[A-Z])\)|(?<![^\W_])(?P<alone>[A-Z])(?=[*_]{0,3}(?:[.,:;)!]|[ \t]*(?:\n|\Z)))"
    r"|\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice|[Ll]etter)(?:[ ]is)?:?[ ][*_]{0,3}(?P<named>[A-Z])(?![\w'’])"
)
_EXPONENT_OF_A_UNIT = re.compile(r"(?<=[A-Za-z}])\^(?:[0-9]|\{[0-9]\})")


class AnswerFormat(StrEnum):
    """What of an agent's text is its answer. With `auto` it is the text between <answer> and </answer>, else in the
    last box, else behind an <answer> that nothing closes, else behind the last "The answer is", else the last number if
    a number is expected, else the last line."""

    AUTO = "auto"
    TAG = "tag"
    BOXED = "boxed"
    LAST_NUMBER = "last_number"
    LINE = "line"
    CHOICE = "choice"

    @property
    def instruction(self) -> str:
        """Says to the agent what is read; empty for `auto`, as it depends on the question."""
        return _INSTRUCTIONS.get(self, "")

    @property
    def read(self) -> str:
        """What is read, in words; empty for `auto`."""
        return _READ.get(self, "")

    @property
    def missing(self) -> str:
        """Feedback for a text without an answer: a sentence or two."""
        return f"No answer was found. What is read: {self.read}." if self.read else "No answer was found."

    def written(self, answer: str) -> str:
        """The answer as an agent writes it in this format."""
        return {AnswerFormat.TAG: f"<answer>{answer}</answer>", AnswerFormat.BOXED: f"\\boxed{{{answer}}}"}.get(
            self, answer
        )


_INSTRUCTIONS = {
    AnswerFormat.TAG: "Put your final answer, and nothing else, between <answer> and </answer>. Only that is read.",
    AnswerFormat.BOXED: "Put your final answer, and nothing else, in \\boxed{}. Only the last box is read.",
    AnswerFormat.LAST_NUMBER: "The answer is a number. The last number that you write is read.",
    AnswerFormat.LINE: "Write your final answer, and nothing else, on the last line. Only the last line is read.",
    AnswerFormat.CHOICE: "Answer with the letter of a choice, such as (A). The last such letter is read.",
}
_READ = {
    AnswerFormat.TAG: "the text between <answer> and </answer>",
    AnswerFormat.BOXED: "the last \\boxed{}",
    AnswerFormat.LAST_NUMBER: "the last number",
    AnswerFormat.LINE: "the last line",
    AnswerFormat.CHOICE: "the last letter that stands alone",
}


def marked(answer: str) -> str | None:
    """The text between the last <answer> and its </answer>, else in the last box; None if there is neither."""
    return _found(without_thoughts(answer), AnswerFormat.AUTO)


def fenced(answer: str) -> str | None:
    """The last complete block in triple backticks outside thoughts, as it is written; None if there is none."""
    parts = without_thoughts(answer).split(_FENCE)
    if len(parts) < 3:
        return None
    return parts[-2] if len(parts) % 2 else parts[-3]


def boxed(answer: str) -> str | None:
    r"""The content of the last complete `\boxed{…}` outside thoughts, or None. Braces may nest. A `\text{…}` inside,
    which models write in mathematics, is unwrapped. Content longer than any answer is ignored."""
    return _boxed(without_thoughts(answer))


def read_answer(answer: str, expected: str = "", how: AnswerFormat = AnswerFormat.AUTO) -> str:
    """The answer in this format; "" if there is none. `expected` is the right answer if known. If that is a number or a
    fraction, one is returned: what the text says that the answer is, else the last one. A calculation or a choice, such
    as 16/8 or "8 or 9", is returned as it is written. Of other answers `expected` says the form alone: lines, a period,
    marks around it. Its value has no influence."""
    said = without_thoughts(answer)
    if how is AnswerFormat.CHOICE:
        return last_letter(said)
    pattern = _pattern(expected.strip())
    if how is AnswerFormat.LAST_NUMBER:
        return _last(pattern or _pattern(_simple(expected).strip(" $")) or _NUMBER, said) or _last(_NUMBER, said)
    auto = how is AnswerFormat.AUTO
    if pattern is not None and how is AnswerFormat.LINE:
        return _value(pattern, _last_line(said)) or _last_line(said)
    found = _last_statement(_last_line(said), expected) if how is AnswerFormat.LINE else _found(said, how)
    if found is None and auto:
        found = _unclosed(said, expected)
    if pattern is not None:
        whole = said if found is None and auto else found or ""
        return _value(pattern, whole, marked=found is not None) or found or ""
    return _last_statement(said, expected) if found is None and auto else found or ""


def _pattern(expected: str) -> re.Pattern[str] | None:
    """Of the answers of its kind, if it is a number or a fraction."""
    return next((kind for kind in (_NUMBER, _FRACTION, _HEX) if kind.fullmatch(expected)), None)


def normalize(text: str) -> str:
    """The text in lower case, without punctuation, articles and extra white space, as the official evaluation of
    HotpotQA (`hotpot_evaluate_v1.py`) compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def last_number(text: str) -> str:
    """The last number, without thousands separators; "" if there is none."""
    return _last(_NUMBER, text)


def last_letter(text: str, letters: str = string.ascii_uppercase) -> str:
    """The last of these letters that stands for a choice, as in "(B)", "B." or "The answer is B"; "" if there is
    none."""
    found = ""
    for match in _LETTER.finditer(text):
        letter = match["bracketed"] or match["alone"] or match["named"]
        found = letter if letter in letters else found
    return found


def values(text: str) -> list[str]:
    """All numbers and fractions, in order, without thousands separators; LaTeX's fractions as `1/2`."""
    return [match[0].translate(_PLAIN) for match in _VALUE.finditer(_simple(text))]


def stated_value(text: str) -> str:
    """The number or fraction that a text without thoughts says its answer is, as in "The answer is 8. I took 2 steps.";
    else the last; "" if there is none. The text of a calculation or a choice, if that is what it says."""
    return _value(_VALUE, text)


def one_value(text: str) -> str:
    """As `values`, of a text that is one number or fraction and nothing else; else ""."""
    match = _VALUE.fullmatch(_simple(text).strip())
    return match[0].translate(_PLAIN) if match else ""


def _tagged(said: str) -> str | None:
    opened = closed = found = None
    for mark in _MARKS.finditer(said):
        if not mark["closes"]:
            opened = mark.end()
        elif opened is not None:
            closed = mark.start()
            found = opened
            opened = None
    return said[found:closed].strip() if found is not None else None


def _unclosed(said: str, expected: str) -> str | None:
    """The text behind an <answer> that nothing closes, if it can be all of an answer; engines leave out a </answer>
    that they stop at."""
    marks = list(_MARKS.finditer(said))
    if not marks or marks[-1]["closes"]:
        return None
    rest = said[marks[-1].end() :].strip()
    return rest if rest and ("\n" in expected or "\n" not in rest) else None


def _found(said: str, how: AnswerFormat) -> str | None:
    """The text that a format with marks reads; None if its marks are missing."""
    tagged = _tagged(said) if how is not AnswerFormat.BOXED else None
    return _boxed(said) if tagged is None and how is not AnswerFormat.TAG else tagged


def _value(pattern: re.Pattern[str], text: str, *, marked: bool = False) -> str:
    """The number that the text says its answer is, as in "The answer is 9 - 1 = 8. I took 2 steps."; else the last.
    What is said, or `marked`, may be a calculation or a choice of numbers: then the text of that."""
    stated = _simple(_stated(text))
    if _NUMBER_COMES.match(stated):
        return _single(pattern, _SENTENCE.split(stated, maxsplit=1)[0], first=True)
    plain = _simple(text)
    if marked and _NUMBER.search(plain):
        return _single(pattern, plain.strip(), first=False)
    line = _last_line(plain)
    said = pattern.match(line, _TRAIL_BEGIN.match(line).end())  # type: ignore[union-attr]  # it matches anything
    if said and _TRAIL.match(line, said.end()):
        return said[0].translate(_PLAIN)
    return _last(pattern, text) or _last(_NUMBER, text)


def _single(pattern: re.Pattern[str], said: str, *, first: bool) -> str:
    """A number that is no part of a calculation or a choice, on the last side of an equation that has one: the first
    there if asked for, else the last. `said` if there is none."""
    sides = said.split("=")
    sides[1:] = [f"={side}" for side in sides[1:]]  # which tells a sign from a subtraction
    for kind in (pattern, _NUMBER):
        for side in reversed(sides):
            found = list(kind.finditer(side))
            for match in found[: 1 if first else 0] + found[-1:]:
                if not _is_operand(side, match):
                    return match[0].translate(_PLAIN)
    return said


def _is_operand(side: str, match: re.Match[str]) -> bool:
    """Whether an operator, or the word "or", stands between the number and another one."""
    sign = match[0][:1] if match[0][0] in _SIGNS else ""
    before = side[max(0, match.start() - _BEFORE_LENGTH) : match.start()] + sign
    return _GOES_ON.match(side, match.end()) is not None or _GOES_BEFORE.search(before) is not None


def _stated(text: str, *, lines: bool = False) -> str:
    """What stands behind the last "answer is": the rest of its line, the next line, or the first one of a fenced block;
    with `lines`, the whole block or all up to an empty line. "" if nothing does."""
    text = text.strip()
    last_line = text.rfind("\n") + 1
    leads = [lead.end() for lead in _LEAD.finditer(text) if lead.start() >= last_line or _opens(text, lead.start())]
    rest = text[leads[-1] :].lstrip(" *\n") if leads else ""
    if rest.startswith(_FENCE):
        rest = rest.partition("\n")[2].partition(_FENCE)[0].strip("\n")
    return rest.split("\n\n" if lines else "\n", maxsplit=1)[0]


def _opens(text: str, place: int) -> bool:
    """Whether a sentence begins with the "answer" at this place, apart from words such as "So my final"."""
    line = text.rfind("\n", max(0, place - _OPENING_LENGTH), place) + 1
    return _OPENING.search(text[max(line, place - _OPENING_LENGTH, 0) : place]) is not None


def _last(pattern: re.Pattern[str], text: str) -> str:
    found = ""
    for match in pattern.finditer(_simple(text)):
        found = match[0]
    return found.translate(_PLAIN)


def _simple(text: str) -> str:
    """The text without LaTeX in its numbers, and without exponents of units: "8 m^2" has one number."""
    plain = _LATEX_FRACTION.sub(r"\1/\2", _EXPONENT_OF_A_UNIT.sub("", text))
    return plain.replace("{,}", ",").replace("\\,", "").replace("\\!", "")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _last_statement(text: str, expected: str) -> str:
    """What the last "answer is" says; without one the last line, if `expected` is known without a begin such as "So it
    is". The last paragraph, if `expected` has several lines."""
    lines = "\n" in expected.strip()
    last = text.strip().rpartition("\n\n")[2] if lines else _last_line(text)
    stated = _stated(text, lines=lines)
    if not stated:
        begin = _BEGIN.match(last) if expected and not _BEGIN.match(expected) else None
        stated = last[begin.end() :] if begin is not None else last
    return _without_marks(_alone(stated, expected), expected) or last


def _alone(stated: str, expected: str) -> str:
    """Without further sentences and the left side of an equation, unless such an answer is expected."""
    if not expected or "\n" in expected:
        return stated
    if not _SENTENCE.search(expected):
        stated = _SENTENCE.split(stated, maxsplit=1)[0]
    return stated if _EQUALS.search(expected) else _EQUALS.split(stated)[-1]


def _without_marks(text: str, expected: str) -> str:
    """Without emphasis, quotes, signs of formulas and a period at its ends, but for those of `expected`."""
    own = {edge for line in expected.splitlines() for edge in (line[:1], line[-1:])} or {'"'}  # unknown: as in 5'2"
    marks = "".join(mark for mark in _EDGES if mark not in own)
    return text.lstrip(marks).rstrip(marks if expected.endswith(".") else f"{marks}.")


def _boxed(said: str) -> str | None:
    end = len(said)
    for _ in range(3):  # the last box may be cut off; an earlier one may be complete
        start = said.rfind(_BOX, 0, end)
        if start < 0:
            return None
        content = _until_closed(said[start + len(_BOX) : start + len(_BOX) + MAX_BOXED])
        if content is not None:
            return _TEXT_COMMAND.sub(r"\1", content).strip()
        end = start
    return None


def _until_closed(text: str) -> str | None:
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index]
    return None
