"""Entries with the greatest lower bound of the measured uplift: what is proved to help most comes first.

Without any use the bound is -1, so among entries that were never tried those come first whose text was written last."""

from __future__ import annotations

from mulligan.common.reflections import ReflectionQuery
from mulligan.memory.retrieval._selection import selection
from mulligan.memory.store import Found, Order, Store


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    return await store.find(selection(query), Order.UPLIFT, query.limit)
