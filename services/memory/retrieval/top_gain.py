"""Entries that report a success with the greatest gain, as their writers claim it."""

from __future__ import annotations

from mulligan.common.reflections import ReflectionQuery
from mulligan.memory.retrieval._selection import selection
from mulligan.memory.store import Found, Order, Store


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    return await store.find(selection(query, successes_only=True), Order.GAIN, query.limit)
