"""Reads of entries: at a version of a scope, one by one, and page by page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import (
    MemoryChange,
    Provenance,
    ReflectionKind,
    ReflectionStatus,
    StoredReflection,
    Uplift,
)
from mulligan.memory.store import ChangePage, Found, Order, Page, Selection, Snapshot
from mulligan.memory.stores._sql import tags
from mulligan.memory.stores._sql.tables import (
    Characters,
    changes,
    place_in,
    reflections,
    scopes,
    sources,
    standings,
    texts,
)

Row = sa.Row[Any]
Rows = Sequence[Row]

_COLUMNS = (
    *(column for column in reflections.c if column.name not in ("standing_id", "revised_by", "revised_version")),
    *(standings.c[name] for name in ("revision", "evidence_since", "status", "key", "tags", "tries", "gain")),
    *(standings.c[name] for name in ("uses_shown", "uses_left_out", "mean_shown", "mean_left_out")),
    *(standings.c[name] for name in ("uplift", "lower", "upper", "text_id")),
    texts.c.text,
    scopes.c.name.label("scope"),
)
# An entry with one of its standings; an erased one has no text.
STATES = (
    sa.select(*_COLUMNS)
    .select_from(standings)
    .join(reflections, reflections.c.position == standings.c.position)
    .join(scopes, scopes.c.id == standings.c.scope_id)
    .outerjoin(texts, texts.c.id == standings.c.text_id)
)
_NEWEST_STATES = STATES.where(standings.c.id == reflections.c.standing_id)

LATEST_FIRST = standings.c.position.desc()
_SQL_ORDERS: dict[Order, tuple[Any, ...]] = {
    Order.NEWEST: (LATEST_FIRST,),
    Order.GAIN: (standings.c.gain.desc(), LATEST_FIRST),
    Order.UPLIFT: (standings.c.lower.desc(), LATEST_FIRST),
    Order.FEWEST_USES: (standings.c.tries, LATEST_FIRST),
}
_ORDERS: dict[Order, Callable[[Row], tuple[float, ...]]] = {  # the same, of rows
    Order.NEWEST: lambda row: (-row.position,),
    Order.GAIN: lambda row: (-row.gain, -row.position),
    Order.UPLIFT: lambda row: (-row.lower, -row.position),
    Order.FEWEST_USES: lambda row: (row.tries, -row.position),
}


def at_version(db: sa.Connection, selection: Selection) -> tuple[Row | None, int]:
    """The scope and the version that a selection is about; None for a scope without writes. Raises UNKNOWN_VERSION and
    SNAPSHOT_REDACTED."""
    scope = db.execute(sa.select(scopes).where(scopes.c.name == selection.scope)).one_or_none()
    newest = scope.version if scope else 0
    version = newest if selection.version is None else selection.version
    if version > newest:
        message = f"scope {selection.scope!r} is at version {newest}, not yet at {version}"
        raise DomainError(Reason.UNKNOWN_VERSION, message, version=newest)
    if scope is not None and version < newest and (readable := _readable(db, scope.id, version)) > version:
        message = f"an entry of version {version} of scope {selection.scope!r} was erased; {readable} can be read"
        raise DomainError(Reason.SNAPSHOT_REDACTED, message, version=readable)
    return scope, version


def _readable(db: sa.Connection, scope_id: int, version: int) -> int:
    """The first version from this one on that had no entry which was erased since."""
    entry = reflections.c
    while True:
        until = sa.select(sa.func.max(entry.deleted_version)).where(
            entry.scope_id == scope_id,
            entry.erased_version.is_not(None),
            entry.deleted_version > version,
            entry.version <= version,
        )
        found = db.execute(until).scalar()
        if found is None:
            return version
        version = found


def find(db: sa.Connection, selection: Selection, order: Order, limit: int) -> Found:
    return in_order(db, selection, STATES, _SQL_ORDERS[order], _ORDERS[order], limit)


def in_order(
    db: sa.Connection,
    selection: Selection,
    states: sa.Select[Any],
    by: Sequence[Any],
    key: Callable[[Row], tuple[float, ...]],
    limit: int,
    of_texts: Sequence[Any] = (),
) -> Found:
    """The first of the states that are selected. `by` is the order in SQL, `key` the same of rows. `of_texts` are
    further conditions, on texts; with them the order may be one of texts, too. Only standings are sorted: the rest is
    read of those that are returned."""
    scope, version = at_version(db, selection)
    if scope is None:
        return Found((), version)
    ids = sa.select(standings.c.id).correlate(None)
    if selection.kinds or selection.task_prefix:
        ids = ids.join(reflections, reflections.c.position == standings.c.position)
    if of_texts:
        ids = ids.join(texts, texts.c.id == standings.c.text_id).where(*of_texts)
    ids = ids.where(
        standings.c.scope_id == scope.id,
        standings.c.environment == selection.environment,
        *_filters(selection),
    )
    rows: list[Row] = []
    for visible in _visible(version, scope.version):
        first = ids.where(*visible).order_by(*by).limit(limit)
        rows += db.execute(states.where(standings.c.id.in_(first))).all()
    rows.sort(key=key)
    return Found(as_then(db, rows[:limit]), version)


def states_of(
    db: sa.Connection, selection: Selection, scope: Row, version: int, positions: Sequence[int]
) -> dict[int, Row]:
    """Those of the entries that the version selects, by position."""
    wanted = STATES.where(standings.c.environment == selection.environment, *_filters(selection))
    current, *closed = _visible(version, scope.version)
    at_last = (reflections.c.position.in_(positions), standings.c.id == reflections.c.standing_id)
    rows = list(db.execute(wanted.where(*at_last, *current)).all())
    for visible in closed:
        rows += db.execute(wanted.where(standings.c.position.in_(positions), *visible)).all()
    return {row.position: row for row in rows}


def _visible(version: int, newest: int) -> Iterator[tuple[Any, ...]]:
    """Conditions under which a standing belongs to a version: one for open rows, one for those closed since. Two short
    queries are faster than one with both."""
    begun = standings.c.from_version <= version
    yield standings.c.until_version.is_(None), begun
    if version < newest:
        yield standings.c.until_version > version, begun


def _filters(selection: Selection) -> Iterator[Any]:
    yield standings.c.status.in_([status.value for status in selection.statuses])
    if selection.successes_only:
        yield standings.c.success == sa.true()
    if selection.kinds:
        yield reflections.c.kind.in_([kind.value for kind in selection.kinds])
    if selection.key:
        yield standings.c.key == selection.key
    for tag in selection.tags:
        yield place_in(standings.c.tags, sa.literal(tags.written([tag]), sa.Text)) > 0
    if selection.task_prefix:
        yield place_in(reflections.c.task_id, sa.literal(selection.task_prefix, Characters)) == 1


def newest(db: sa.Connection, reflection_id: str) -> Row:
    """Raises UNKNOWN_REFLECTION."""
    row = db.execute(_NEWEST_STATES.where(reflections.c.reflection_id == reflection_id)).one_or_none()
    if row is None:
        raise DomainError(Reason.UNKNOWN_REFLECTION, f"no reflection {reflection_id!r} here")
    return row


def get(db: sa.Connection, reflection_id: str) -> StoredReflection:
    return as_now(db, [newest(db, reflection_id)])[0]


def page(db: sa.Connection, scope: str, position: int, limit: int, include_deleted: bool) -> Page:
    wanted = _NEWEST_STATES.where(reflections.c.position > position)
    if scope:
        wanted = wanted.where(reflections.c.scope_id == scope_number(scope))
    if not include_deleted:
        wanted = wanted.where(reflections.c.deleted_version.is_(None))
    rows = db.execute(wanted.order_by(reflections.c.position).limit(limit + 1)).all()
    more = len(rows) > limit
    return Page(as_now(db, rows[:limit]), rows[limit - 1].position if more else None)


def change_page(db: sa.Connection, scope: str, position: int, limit: int) -> ChangePage:
    wanted = sa.select(changes, scopes.c.name.label("scope")).join(scopes, scopes.c.id == changes.c.scope_id)
    wanted = wanted.where(changes.c.id > position)
    if scope:
        wanted = wanted.where(changes.c.scope_id == scope_number(scope))
    rows = db.execute(wanted.order_by(changes.c.id).limit(limit + 1)).all()
    found = (
        MemoryChange(
            scope=row.scope,
            version=row.version,
            action=row.action,
            reflection_id=row.reflection_id,
            actor=row.actor,
            changed_at=instant(row.changed_microseconds),
            detail=row.detail,
        )
        for row in rows[:limit]
    )
    return ChangePage(tuple(found), rows[limit - 1].id if len(rows) > limit else None)


def snapshot(db: sa.Connection, scope: str) -> Snapshot:
    row = db.execute(sa.select(scopes).where(scopes.c.name == scope)).one_or_none()
    return Snapshot(row.version, row.entries) if row else Snapshot(0, 0)


def derived_from(db: sa.Connection, reflection_id: str) -> Sequence[str]:
    origin = reflections.alias()
    wanted = (
        sa.select(reflections.c.reflection_id)
        .join(sources, sources.c.position == reflections.c.position)
        .join(origin, origin.c.position == sources.c.source)
        .where(origin.c.reflection_id == reflection_id)
        .order_by(reflections.c.position)
    )
    return tuple(db.execute(wanted).scalars())


def scope_number(scope: str) -> sa.ScalarSelect[Any]:
    return sa.select(scopes.c.id).where(scopes.c.name == scope).scalar_subquery()


def instant(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def as_then(db: sa.Connection, rows: Rows) -> tuple[StoredReflection, ...]:
    """The entries as they were while they had these standings: not deleted yet."""
    return tuple(replace(one, deleted_version=None) for one in as_now(db, rows))


def as_now(db: sa.Connection, rows: Rows) -> tuple[StoredReflection, ...]:
    origins = _sources(db, [row.position for row in rows]) if rows else {}
    return tuple(_entry(row, origins.get(row.position, ())) for row in rows)


def _sources(db: sa.Connection, positions: Sequence[int]) -> dict[int, tuple[str, ...]]:
    wanted = (
        sa.select(sources.c.position, reflections.c.reflection_id)
        .join(reflections, reflections.c.position == sources.c.source)
        .where(sources.c.position.in_(positions))
        .order_by(sources.c.position, sources.c.place)
    )
    found: dict[int, tuple[str, ...]] = {}
    for position, source in db.execute(wanted):
        found[position] = (*found.get(position, ()), source)
    return found


def _entry(row: Row, source_ids: tuple[str, ...]) -> StoredReflection:
    return StoredReflection(
        reflection_id=row.reflection_id,
        scope=row.scope,
        text=row.text or "",
        provenance=provenance(row),
        version=row.version,
        created_at=instant(row.created_microseconds),
        deleted_version=row.deleted_version,
        kind=ReflectionKind(row.kind),
        key=row.key,
        tags=tags.read(row.tags),
        source_ids=source_ids,
        status=ReflectionStatus(row.status),
        revision=row.revision,
        uplift=_uplift(row),
        erased_version=row.erased_version,
    )


def provenance(row: Row) -> Provenance:
    return Provenance(
        run_id=row.run_id,
        experience_id=row.experience_id,
        environment=row.environment,
        task_id=row.task_id,
        policy_version=row.policy_version,
        reward_before=row.reward_before,
        reward_after=row.reward_after,
        success=bool(row.success),
    )


def _uplift(row: Row) -> Uplift | None:
    if not row.uses_shown + row.uses_left_out:
        return None
    return Uplift(
        uses_shown=row.uses_shown,
        uses_left_out=row.uses_left_out,
        mean_shown=row.mean_shown,
        mean_left_out=row.mean_left_out,
        uplift=row.uplift,
        lower=row.lower,
        upper=row.upper,
    )
