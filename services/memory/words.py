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
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mulligan.memory.timeline import Floats, Mask, Places, Timeline, best_first, grown

_K1 = 1.2
_B = 0.75
_MAX_POSTINGS = 100_000  # that a search reads, if it can: the rarest words first
_LONGEST_WORD = 64  # characters; what is longer is cut
_MOST_WORDS = 16_384  # of a text that count, the first ones
_WORD_BYTES = 400  # of a word in an index, and of a text that has it
_POSTING_BYTES = 9
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
    """The words of a scope's texts: for each word the places of the texts that have it, and how often. Of a very long
    text the first words count: one of a megabyte can have a hundred thousand that no other text has."""

    def __init__(self) -> None:
        self.texts = Timeline()
        self._lengths: Places = np.zeros(0, np.int64)
        self._postings: dict[str, tuple[array[int], array[int]]] = {}
        self._posting_count = 0
        self._dampings: list[tuple[Mask, int, Floats | None]] = []  # of the last two versions that were asked for

    @property
    def bytes(self) -> int:
        """About the memory that it takes."""
        postings = len(self._postings) * _WORD_BYTES + self._posting_count * _POSTING_BYTES
        return self.texts.bytes + 3 * self._lengths.nbytes + postings

    def add(self, text_id: int, position: int, environment: str, begins: int, ends: int | None, text: str) -> None:
        place = self.texts.add(text_id, position, environment, begins, ends)
        counts = Counter(words(text)[:_MOST_WORDS])
        self._posting_count += len(counts)
        if place == len(self._lengths):
            self._lengths = grown(self._lengths, place)
        self._lengths[place] = counts.total()
        for word, count in counts.items():
            places, often = self._postings.setdefault(word, (array("i"), array("i")))
            places.append(place)
            often.append(count)

    def erase(self, position: int, version: int) -> None:
        """Nothing of the entry is left, and from this version on it is not there."""
        for place in self.texts.close_entry(position, version).tolist():
            self._lengths[place] = 0
            for word, (places, often) in list(self._postings.items()):
                at = bisect_left(places, place)
                if at < len(places) and places[at] == place:
                    del places[at], often[at]
                    self._posting_count -= 1
                    if not places:
                        del self._postings[word]

    def best(self, version: int, environment: str, text: str, first: int) -> Iterator[list[int]]:
        """The positions of the version's entries that share a word with the text, in blocks, the best first
        (`best_first`). Of many words the rarest decide."""
        visible = self.texts.visible(version, environment)
        count, damping = self._damping(visible)
        if damping is None:  # no entry has words
            return
        read = 0
        parts: list[tuple[NDArray[np.intc], NDArray[np.intc]]] = []
        rarities: list[float] = []
        for word, known in self._rarest_first(text, len(visible)):
            if read and read + known > _MAX_POSTINGS:
                break
            # Copies: a list cannot grow while an array looks into it.
            having, often = (np.frombuffer(part, np.intc, known).copy() for part in self._postings[word])
            if count < len(visible):
                there = visible[having]
                having, often = having[there], often[there]
            read += len(having)
            parts.append((having, often))
            rarities.append(math.log(1 + (count - len(having) + 0.5) / (len(having) + 0.5)))
        if not parts:
            return
        all_having, all_often = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        rarity = np.repeat(rarities, [len(having) for having, _ in parts])
        added = rarity * all_often * (_K1 + 1) / (all_often + damping[all_having])
        scores: Floats = np.asarray(np.bincount(all_having, added, len(visible)), np.float64)
        yield from best_first(scores, self.texts.positions, scores > 0, first)

    def _damping(self, visible: Mask) -> tuple[int, Floats | None]:
        """How many texts are visible, and for each text what its length adds below the fraction of its score; None
        where the visible ones have no words."""
        if not (found := [one for one in self._dampings if one[0] is visible]):
            count = int(visible.sum())
            lengths = self._lengths[: len(visible)]
            total = int(lengths[visible].sum())
            damping = _K1 * (1 - _B + _B * (lengths / lengths[visible].mean())) if total else None
            found = [(visible, count, damping)]
            self._dampings = [*self._dampings[-1:], *found]
        return found[0][1:]

    def _rarest_first(self, text: str, begun: int) -> list[tuple[str, int]]:
        """The known words of the text, each with the number of texts that have it, among the first `begun`."""
        found = []
        for word in sorted(set(words(text))):
            if word in self._postings:
                places = np.frombuffer(self._postings[word][0], np.intc)
                if known := int(np.searchsorted(places, begun)):
                    found.append((word, known))
        return sorted(found, key=lambda pair: pair[1])
