"""Some entries of each of several strategies, in the order of `query.mix`, without near-duplicates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from mulligan.common.reflections import ReflectionQuery, StoredReflection
from mulligan.memory.retrieval import by
from mulligan.memory.store import Found, Store

SIMILARITY = 0.8  # share of common words from which one of two entries is left out


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    kept: list[StoredReflection] = []
    assert query.version is not None, "`retrieve` of the package sets it"
    for part in query.mix:
        found = await by(part.strategy, replace(query, strategy=part.strategy, limit=part.limit), store)
        for one in found.reflections:
            if not _known(one, kept):
                kept.append(one)
    return Found(tuple(kept[: query.limit]), query.version)


def _known(one: StoredReflection, kept: Sequence[StoredReflection]) -> bool:
    return any(
        one.reflection_id == other.reflection_id or similarity(one.text, other.text) >= SIMILARITY for other in kept
    )


def similarity(one: str, other: str) -> float:
    """Jaccard index of the two texts' sets of words: 1 for the same words, 0 for none in common."""
    left, right = (set(re.findall(r"\w+", text.lower())) for text in (one, other))
    return len(left & right) / len(left | right) if left | right else float(one == other)
