"""Entries that were tried least often, so that all get evidence. A use of a quarantined entry counts as eight: it is
tried again now and then, and can recover."""

from __future__ import annotations

from mulligan.common.reflections import ReflectionQuery, ReflectionStatus
from mulligan.memory.retrieval._selection import selection
from mulligan.memory.store import RETRIEVED, Found, Order, Store


async def retrieve(query: ReflectionQuery, store: Store) -> Found:
    statuses = RETRIEVED | {ReflectionStatus.PROBATION, ReflectionStatus.QUARANTINED}
    return await store.find(selection(query, statuses=statuses), Order.FEWEST_USES, query.limit)
