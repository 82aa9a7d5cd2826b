"""Some entries of each of several strategies, in the order of `query.mix`, without near-duplicates, within the query's
budget of tokens.

Near-duplicates have most pairs of adjacent words in common (Broder, On the Resemblance and Containment of Documents,
1997, section 2). Single words would not do: rules that say the opposite of each other can have the same words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from mulligan.common.reflections import MixPart, ReflectionQuery, StoredReflection
from mulligan.common.tasks import gather_or_cancel
from mulligan.memory.retrieval import Budget, by
from mulligan.memory.store import Found, Store

SIMILARITY = 0.8  # share of common pairs of words from which one of two entries is left out
_SPARE = 10  # entries of a strategy that may be near-duplicates before it finds less than its limit
_FEW_SPARE = 2  # asked for first


Pairs = frozenset[tuple[str, ...]]


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    assert query.version is not None, "`retrieve` of the package sets it"
    chosen = _Chosen(Budget.of(query))
    asked = [most + _FEW_SPARE for most in accumulate(part.limit for part in query.mix)]
    first = await gather_or_cancel(_find(query, *one, store) for one in zip(query.mix, asked, strict=True))
    for part, limit, found in zip(query.mix, asked, first, strict=True):
        most = len(chosen.entries) + part.limit
        chosen.add(found[: most + _SPARE], most)
        if len(chosen.entries) < most and len(found) == limit < most + _SPARE:
            chosen.add(await _find(query, part, most + _SPARE, store), most)
    return Found(tuple(chosen.entries.values())[: query.limit], query.version)


async def _find(query: ReflectionQuery, part: MixPart, limit: int, store: Store) -> tuple[StoredReflection, ...]:
    return tuple((await by(part.strategy, replace(query, strategy=part.strategy, limit=limit), store)).reflections)


class _Chosen:
    def __init__(self, budget: Budget) -> None:
        self.entries: dict[str, StoredReflection] = {}  # by their ids
        self._pairs: list[Pairs] = []  # of each
        self._budget = budget

    def add(self, found: Sequence[StoredReflection], most: int) -> None:
        """What is new of these and fits, until there are so many entries."""
        for one in found:
            if len(self.entries) == most:
                break
            if one.reflection_id in self.entries:
                continue
            own = pairs(one.text)
            if all(similarity(own, other) < SIMILARITY for other in self._pairs) and self._budget.takes(one.text):
                self.entries[one.reflection_id] = one
                self._pairs.append(own)


def similarity(one: Pairs, other: Pairs) -> float:
    """Jaccard index: 1 for the same pairs, 0 for none in common."""
    return len(one & other) / len(one | other)


def pairs(text: str) -> Pairs:
    """The pairs of adjacent words; a single word, and a text without words, stand alone."""
    words = re.findall(r"\w+", text.lower()) or [text]
    return frozenset(pairwise(words) if len(words) > 1 else [tuple(words)])
