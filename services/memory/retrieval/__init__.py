"""Which entries an agent is shown: one file for each retrieval strategy, with its name.

A strategy is a module with `retrieve(query, store)`, which returns at most `query.limit` entries, the best first.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

from mulligan.common.reflections import ReflectionQuery, RetrievalStrategy
from mulligan.memory.store import Found, Store

_BYTES_PER_TOKEN = 4


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    """Asks the query's strategy. All of it sees one version. Raises as `Store.find` does."""
    if query.version is None:
        query = replace(query, version=(await store.snapshot(query.scope)).version)
    found = await by(query.strategy, query, store)
    return found if query.max_tokens == 0 else _within(found, query.max_tokens)


async def by(strategy: RetrievalStrategy, query: ReflectionQuery, store: Store) -> Found:
    module = importlib.import_module(f"{__name__}.{strategy.value}")
    found: Found = await module.retrieve(query, store)
    return found


def _within(found: Found, max_tokens: int) -> Found:
    """Without the entries that do not fit beside the better ones."""
    kept = []
    left = max_tokens
    for reflection in found.reflections:
        tokens = -(-len(reflection.text.encode()) // _BYTES_PER_TOKEN)
        if tokens <= left:
            kept.append(reflection)
            left -= tokens
    return replace(found, reflections=tuple(kept))
