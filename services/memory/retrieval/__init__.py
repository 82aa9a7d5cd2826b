"""Which entries an agent is shown: one file for each retrieval strategy, with its name.

A strategy is a module with `retrieve(query, store)`, which returns at most `query.limit` entries, the best first.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Self

from mulligan.common.reflections import ReflectionQuery, RetrievalStrategy
from mulligan.memory.store import ANSWER_BYTES, Found, Store

_BYTES_PER_TOKEN = 4
_SPARE = 4  # times the limit are asked for, where some may not fit
_MOST = 100  # but no more than so many, or the limit


@dataclass
class Budget:
    """What the texts of an answer may still take, in tokens."""

    left: int

    @classmethod
    def of(cls, query: ReflectionQuery) -> Self:
        most = ANSWER_BYTES // _BYTES_PER_TOKEN
        return cls(min(query.max_tokens or most, most))

    def takes(self, text: str) -> bool:
        """Whether it fits beside those that were taken. Then it is taken."""
        tokens = -(-len(text.encode()) // _BYTES_PER_TOKEN)
        fits = tokens <= self.left
        self.left -= tokens if fits else 0
        return fits


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    """Asks the query's strategy. All of it sees one version. Raises as `Store.find` does."""
    if query.version is None:
        query = replace(query, version=(await store.snapshot(query.scope)).version)
    limit = query.limit
    if query.max_tokens and query.strategy is not RetrievalStrategy.MIX:  # some may not fit
        query = replace(query, limit=min(_SPARE * limit, max(limit, _MOST)))
    budget = Budget.of(query)
    found = await by(query.strategy, query, store)
    return replace(found, reflections=tuple(one for one in found.reflections if budget.takes(one.text))[:limit])


async def by(strategy: RetrievalStrategy, query: ReflectionQuery, store: Store) -> Found:
    module = importlib.import_module(f"{__name__}.{strategy.value}")
    found: Found = await module.retrieve(query, store)
    return found
