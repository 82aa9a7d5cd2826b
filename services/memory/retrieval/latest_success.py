"""The paper's: the latest entries that report a success (arXiv 2602.13949, section 3)."""

from __future__ import annotations

from mulligan.common.reflections import ReflectionQuery
from mulligan.memory.retrieval._selection import selection
from mulligan.memory.store import Found, Order, Store


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    return await store.find(selection(query, successes_only=True), Order.NEWEST, query.limit)
