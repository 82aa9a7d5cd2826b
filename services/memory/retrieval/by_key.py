"""All entries of a key, such as the notes on a tool, the latest first."""

from __future__ import annotations

from mulligan.common.reflections import ReflectionQuery
from mulligan.memory.retrieval._selection import selection
from mulligan.memory.store import Found, Order, Store


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    return await store.find(selection(query), Order.NEWEST, query.limit)
