"""The entries that a query is about, before one of the strategies chooses among them."""

from __future__ import annotations

from mulligan.common.reflections import ReflectionQuery, ReflectionStatus
from mulligan.memory.store import RETRIEVED, Selection


def selection(
    query: ReflectionQuery,
    *,
    successes_only: bool = False,
    statuses: frozenset[ReflectionStatus] = RETRIEVED,
) -> Selection:
    return Selection(
        scope=query.scope,
        environment=query.environment,
        version=query.version,
        successes_only=successes_only,
        statuses=statuses,
        kinds=query.kinds,
        key=query.key,
        tags=query.tags,
        task_prefix=query.task_prefix,
    )
