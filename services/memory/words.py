"""Search by words: BM25 (Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009, 3.15).

An index of the database would count words in the texts of all scopes and versions, so what is written later would
change the order that a version had. Here the statistics are those of the texts that the version has in the
environment.
"""

from __future__ import annotations

import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator

import numpy as np

from mulligan.memory.timeline import Floats, Places, Timeline, best_first, grown

_K1 = 1.2
_B = 0.75
_MAX_POSTINGS = 200_000  # that a search reads, if it can: the rarest words first
_LONGEST_WORD = 64  # characters; what is longer is cut
_WORD = re.compile(r"[^\W_]+")
# Scripts without spaces between words: there each character is a word.
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_OTHER_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")


def words(text: str) -> list[str]:
    """In lower case, without regard to how a letter is composed."""
    if text.isascii():
        found = _WORD.findall(text.lower())
    else:
        found = _OTHER_WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [word[:_LONGEST_WORD] for word in found]


class WordIndex:
    """The words of a scope's texts: for each word the places of the texts that have it, and how often."""

    def __init__(self) -> None:
        self.texts = Timeline()
        self._lengths: Places = np.zeros(0, np.int64)
        self._postings: dict[str, tuple[array[int], array[int]]] = {}

    def add(self, text_id: int, position: int, environment: str, begins: int, ends: int | None, text: str) -> None:
        place = self.texts.add(text_id, position, environment, begins, ends)
        counts = Counter(words(text))
        if place == len(self._lengths):
            self._lengths = grown(self._lengths, place)
        self._lengths[place] = counts.total()
        for word, count in counts.items():
            places, often = self._postings.setdefault(word, (array("i"), array("i")))
            places.append(place)
            often.append(count)

    def best(self, version: int, environment: str, text: str, first: int) -> Iterator[list[int]]:
        """The positions of the version's entries that share a word with the text, in blocks, the best first
        (`best_first`). Of many words the rarest decide."""
        visible = self.texts.visible(version, environment)
        scores: Floats = np.zeros(len(visible))
        count = int(visible.sum())
        if count == 0:
            return
        mean = self._lengths[: len(visible)][visible].mean()
        read = 0
        for having, often in self._rarest_first(text, len(visible)):
            if read and read + len(having) > _MAX_POSTINGS:
                break
            there = visible[having]
            places, counts = having[there], often[there]
            read += len(places)
            rarity = math.log(1 + (count - len(places) + 0.5) / (len(places) + 0.5))
            length = self._lengths[places] / mean
            scores[places] += rarity * counts * (_K1 + 1) / (counts + _K1 * (1 - _B + _B * length))
        yield from best_first(scores, self.texts.positions, scores > 0, first)

    def _rarest_first(self, text: str, begun: int) -> list[tuple[Places, Places]]:
        """Of each known word of the text: the places, among the first `begun`, of the texts that have it, and how
        often. Copies: a list cannot grow while an array looks into it."""
        found = []
        for word in sorted(set(words(text))):
            if word in self._postings:
                places, often = (np.frombuffer(part, np.intc) for part in self._postings[word])
                until = int(np.searchsorted(places, begun))
                found.append((places[:until].astype(np.int64), often[:until].astype(np.int64)))
        return sorted(found, key=lambda pair: len(pair[0]))
