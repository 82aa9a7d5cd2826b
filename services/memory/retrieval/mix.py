"""Some entries of each of several strategies, in the order of `query.mix`, without near-duplicates.

Near-duplicates have most pairs of adjacent words in common (Broder, On the Resemblance and Containment of Documents,
1997, section 2). Single words would not do: rules that say the opposite of each other can have the same words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from mulligan.common.reflections import ReflectionQuery, StoredReflection
from mulligan.memory.retrieval import by
from mulligan.memory.store import Found, Store

SIMILARITY = 0.8  # share of common pairs of words from which one of two entries is left out
_SPARE = 10  # entries of a strategy that may be near-duplicates before it finds less than its limit


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    kept: list[StoredReflection] = []
    assert query.version is not None, "`retrieve` of the package sets it"
    for part in query.mix:
        most = len(kept) + part.limit
        wanted = replace(query, strategy=part.strategy, limit=most + _SPARE)
        for one in (await by(part.strategy, wanted, store)).reflections:
            if len(kept) < most and not _known(one, kept):
                kept.append(one)
    return Found(tuple(kept[: query.limit]), query.version)


def _known(one: StoredReflection, kept: Sequence[StoredReflection]) -> bool:
    return any(
        one.reflection_id == other.reflection_id or similarity(one.text, other.text) >= SIMILARITY for other in kept
    )


def similarity(one: str, other: str) -> float:
    """Jaccard index of the two texts' sets of pairs of words: 1 for the same pairs, 0 for none in common."""
    left, right = _pairs(one), _pairs(other)
    return len(left & right) / len(left | right) if left | right else float(one == other)


def _pairs(text: str) -> set[tuple[str, ...]]:
    """Of adjacent words; a single word stands alone."""
    words = re.findall(r"\w+", text.lower())
    return set(pairwise(words)) if len(words) > 1 else {tuple(words)} - {()}
