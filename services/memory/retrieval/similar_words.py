"""Entries that share words with the query's text, such as the task or the trace of an attempt, by BM25."""

from __future__ import annotations

from mulligan.common.reflections import ReflectionQuery
from mulligan.memory.retrieval._selection import selection
from mulligan.memory.store import Found, Store


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    return await store.find_words(selection(query), query.text, query.limit)
