"""Search by words, against the formula written out, at each version."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from mulligan.memory import words as module
from mulligan.memory.stores._sql import ranked
from mulligan.memory.words import WordIndex, words


def test_words_are_found_whatever_their_case_and_composition() -> None:
    assert words("Frozen_Lake: don't GO left2!") == ["frozen", "lake", "don", "t", "go", "left2"]
    assert words("Stra\u00dfe") == words("STRASSE") == ["strasse"]
    assert words("caf\u00e9") == words("cafe\u0301")
    assert words("\u51b0\u306e\u4e0a ice") == ["\u51b0", "\u306e", "\u4e0a", "ice"]
    assert words("x" * 1000) == ["x" * 64]


def expected(texts: dict[int, str], query: str) -> list[int]:
    """Positions, the best first (Robertson and Zaragoza 2009, 3.15; k1 = 1.2, b = 0.75)."""
    counts = {position: Counter(words(text)) for position, text in texts.items()}
    mean = sum(count.total() for count in counts.values()) / max(len(counts), 1)
    scores = {}
    for position, count in counts.items():
        score = 0.0
        for word in sorted(set(words(query))):
            having = sum(word in other for other in counts.values())
            rarity = math.log(1 + (len(counts) - having + 0.5) / (having + 0.5))
            score += rarity * count[word] * 2.2 / (count[word] + 1.2 * (0.25 + 0.75 * count.total() / mean))
        if score > 0:
            scores[position] = score
    return sorted(scores, key=lambda position: (-round(scores[position], 9), -position))


def found(index: WordIndex, version: int, query: str, first: int = 2, environment: str = "lake") -> list[int]:
    return [position for block in index.best(version, environment, query, first) for position in block]


def test_the_order_is_that_of_the_formula_at_each_version() -> None:
    random = np.random.default_rng(5)
    vocabulary = [f"w{number}" for number in range(30)]
    index = WordIndex()
    lives: dict[int, tuple[str, int, int | None]] = {}
    for position in range(1, 120):
        text = " ".join(random.choice(vocabulary, size=random.integers(1, 12)))
        environment = "maze" if position % 7 == 0 else "lake"
        ends = int(position + random.integers(1, 60)) if position % 3 == 0 else None
        index.add(position, position, environment, position, ends, text)
        if environment == "lake":
            lives[position] = (text, position, ends)
    for version in (0, 1, 17, 60, 119, 300):
        there = {
            position: text
            for position, (text, begins, ends) in lives.items()
            if begins <= version and (ends is None or ends > version)
        }
        for _ in range(5):
            query = " ".join(random.choice(vocabulary, size=4))
            assert found(index, version, query) == expected(there, query)
    assert found(index, 300, "unknown words") == [] and found(index, 300, "w1", environment="none") == []


def test_of_many_words_the_rarest_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    index = WordIndex()
    for position in range(1, 101):
        index.add(position, position, "lake", position, None, "the rare" if position == 40 else "the")
    assert found(index, 100, "the rare")[:1] == [40] and len(found(index, 100, "the rare")) == 100
    monkeypatch.setattr(module, "_MAX_POSTINGS", 50)
    assert found(index, 100, "the rare") == [40]
    assert len(found(index, 100, "the")) == 100, "one word is always read"


def test_a_closed_text_is_gone_from_its_version_on() -> None:
    index = WordIndex()
    index.add(7, 1, "lake", 1, None, "ice")
    index.add(8, 2, "lake", 2, None, "ice")
    index.texts.close(7, 4)
    index.texts.close_entry(2, 5)
    assert found(index, 3, "ice") == [2, 1] and found(index, 4, "ice") == [2] and found(index, 5, "ice") == []


def test_texts_without_words_are_never_found() -> None:
    index = WordIndex()
    index.add(1, 1, "lake", 1, None, "...")
    assert found(index, 1, "ice") == found(index, 1, "...") == []
    index.add(2, 2, "lake", 2, None, "ice")
    assert found(index, 1, "ice") == []
    assert found(index, 2, "ice") == [2]


def rare(count: int, begin: int = 0) -> str:
    return " ".join(f"w{number}" for number in range(begin, begin + count))


def test_of_a_very_long_text_the_first_words_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WORDS", 100)
    index = WordIndex()
    index.add(1, 1, "lake", 1, None, rare(1000))
    assert found(index, 1, "w99") == [1] and found(index, 1, "w100") == []


def test_the_memory_of_an_index_is_known() -> None:
    """About: it bounds what the texts of callers take, whether their words are new or not."""
    for texts in ([rare(3000, 3000 * place) for place in range(5)], [rare(30, place % 7) for place in range(3000)]):
        index = WordIndex()
        tracemalloc.start()
        try:
            for place, text in enumerate(texts):
                index.add(place, place, "lake", place, None, text)
            gc.collect()
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert 0.8 * taken < index.bytes < 2 * taken


def test_the_indexes_that_were_used_least_recently_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    indexes = ranked.Indexes()
    for scope in range(5):
        index = WordIndex()
        index.add(1, 1, "lake", 1, None, rare(1000))
        indexes._kept[ranked.Kind.WORDS, scope] = ranked._Kept(index)
    monkeypatch.setattr(ranked, "_MAX_BYTES", 2 * index.bytes)
    with indexes._using(ranked.Kind.WORDS, 1):
        assert [scope for _, scope in indexes._kept] == [4, 1]
    monkeypatch.setattr(ranked, "_MAX_BYTES", 1)
    with indexes._using(ranked.Kind.WORDS, 1):
        assert [scope for _, scope in indexes._kept] == [1], "the one in use stays"
