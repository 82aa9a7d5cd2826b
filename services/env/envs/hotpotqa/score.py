"""Scores HotpotQA answers: normalisation, exact match and F1 as in the official `hotpot_evaluate_v1.py`. The reward is
that of arXiv 2602.13949: 1 for an exact match, else F1 if it is at least 0.3, else 0.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from mulligan.env.answers import normalize

MIN_F1 = 0.3
_CLOSED = ("yes", "no", "noanswer")  # answers of which a part is worth nothing


class Method(StrEnum):
    """How the reward was determined."""

    EXACT_MATCH = "exact match"
    F1 = "F1"
    NO_ANSWER = "no boxed answer"


@dataclass(frozen=True, slots=True)
class Score:
    answer: str
    reward: float
    method: Method


def exact_match(answer: str, gold: str) -> bool:
    return normalize(answer) == normalize(gold)


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words. Repeated words count."""
    ours = normalize(answer)
    theirs = normalize(gold)
    if ours != theirs and (ours in _CLOSED or theirs in _CLOSED):
        return 0.0
    words = ours.split()
    gold_words = theirs.split()
    same = sum((Counter(words) & Counter(gold_words)).values())
    if same == 0:
        return 0.0
    precision = same / len(words)
    recall = same / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def score(answer: str | None, gold: str) -> Score:
    if answer is None or not answer.strip():
        return Score("", 0.0, Method.NO_ANSWER)
    if exact_match(answer, gold):
        return Score(answer, 1.0, Method.EXACT_MATCH)
    value = f1(answer, gold)
    return Score(answer, value if value >= MIN_F1 else 0.0, Method.F1)
