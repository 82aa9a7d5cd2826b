"""Entries whose embeddings are nearest to the query's. The service computes it from the query's text before."""

from __future__ import annotations

from mulligan.common.reflections import ReflectionQuery
from mulligan.memory.retrieval._selection import selection
from mulligan.memory.store import Found, Order, Store


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    if not query.embedding:  # a text without anything to embed is similar to nothing
        return await store.find(selection(query), Order.NEWEST, 0)
    return await store.find_nearest(selection(query), query.embedding, query.limit)
