"""Some entries of each of several strategies, in the order of `query.mix`, without near-duplicates, within the query's
budget of tokens.

Near-duplicates have most pairs of adjacent words in common (Broder, On the Resemblance and Containment of Documents,
1997, section 2). Single words would not do: rules that say the opposite of each other can have the same words.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

from mulligan.common.reflections import ReflectionQuery, StoredReflection
from mulligan.memory.retrieval import Budget, by
from mulligan.memory.store import Found, Store

SIMILARITY = 0.8  # share of common pairs of words from which one of two entries is left out
_SPARE = 10  # entries of a strategy that may be near-duplicates before it finds less than its limit
_FEW_SPARE = 2  # asked for first


Pairs = frozenset[tuple[str, ...]]


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    kept: dict[str, StoredReflection] = {}  # by their ids
    known: list[Pairs] = []  # of each that is kept
    budget = Budget.of(query)
    assert query.version is not None, "`retrieve` of the package sets it"
    for part in query.mix:
        most = len(kept) + part.limit
        for spare in (_FEW_SPARE, _SPARE):
            wanted = replace(query, strategy=part.strategy, limit=most + spare)
            found = (await by(part.strategy, wanted, store)).reflections
            for one in found:
                if len(kept) == most:
                    break
                if one.reflection_id in kept:
                    continue
                own = pairs(one.text)
                if all(similarity(own, other) < SIMILARITY for other in known) and budget.takes(one.text):
                    kept[one.reflection_id] = one
                    known.append(own)
            if len(kept) == most or len(found) < wanted.limit:
                break
    return Found(tuple(kept.values())[: query.limit], query.version)


def similarity(one: Pairs, other: Pairs) -> float:
    """Jaccard index: 1 for the same pairs, 0 for none in common."""
    return len(one & other) / len(one | other)


def pairs(text: str) -> Pairs:
    """The pairs of adjacent words; a single word, and a text without words, stand alone."""
    words = re.findall(r"\w+", text.lower()) or [text]
    return frozenset(pairwise(words) if len(words) > 1 else [tuple(words)])
