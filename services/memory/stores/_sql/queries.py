"""Reads of entries: at a version of a scope, one by one, and page by page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

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
from mulligan.memory.store import ANSWER_BYTES, ChangePage, Found, Order, Page, Selection, Snapshot
from mulligan.memory.stores._sql import tags
from mulligan.memory.stores._sql.sums import Section, damage_of, source_sum
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

_STATEMENTS = 256  # of each sort, that are kept
_PART_SIZE = 10_000  # values; SQLite takes 32,766 of a statement, PostgreSQL 65,535
PART: sa.BindParameter[Sequence[Any]] = sa.bindparam("part", expanding=True)

# One after another in a row of STATES.
ENTRY = Section(reflections, 0)
STANDING = Section(standings, ENTRY.end, "standing_", (ENTRY,))
TEXT = Section(texts, STANDING.end, "text_", (ENTRY, STANDING))
SCOPE = Section(scopes, TEXT.end, "scope_", (ENTRY, STANDING, TEXT))
_COLUMNS = (
    *(column for section in (ENTRY, STANDING, TEXT, SCOPE) for column in section.columns),
    standings.c.id.label("standing_row"),
)
# An entry with one of its standings; an erased one has no text.
STATES = (
    sa.select(*_COLUMNS)
    .select_from(standings)
    .join(reflections, reflections.c.position == standings.c.position)
    .join(scopes, scopes.c.id == standings.c.scope_id)
    .outerjoin(texts, texts.c.id == standings.c.text_id)
)


def entries_with(standing: Any) -> sa.Select[Any]:
    """The same, also of entries that have no such standing because it was damaged."""
    return (
        sa.select(*_COLUMNS)
        .select_from(reflections)
        .outerjoin(standings, standing)
        .outerjoin(scopes, scopes.c.id == reflections.c.scope_id)
        .outerjoin(texts, texts.c.id == standings.c.text_id)
    )


_WITH_IDS = STATES.where(standings.c.id.in_(PART))
_NEWEST_STATES = entries_with(standings.c.id == reflections.c.standing_id)

LATEST_FIRST = standings.c.position.desc()
_LATEST_OF_FEW = (standings.c.position + 0).desc()  # the same; PostgreSQL walks no index of all positions for it


class Ordering(NamedTuple):
    """An order in SQL, and the same of rows."""

    by: tuple[Any, ...]
    key: Callable[[Row], tuple[float, ...]]


ORDERINGS: dict[Order, Ordering] = {
    Order.NEWEST: Ordering((LATEST_FIRST,), lambda row: (-row.position,)),
    Order.GAIN: Ordering((standings.c.gain.desc(), LATEST_FIRST), lambda row: (-row.gain, -row.position)),
    Order.UPLIFT: Ordering(
        (standings.c.lower.desc(), standings.c.written.desc(), LATEST_FIRST),
        lambda row: (-row.lower, -row.written, -row.position),
    ),
    Order.FEWEST_USES: Ordering((standings.c.tries, LATEST_FIRST), lambda row: (row.tries, -row.position)),
}

_OF_SCOPE = Section(scopes)
_SCOPE = sa.select(*_OF_SCOPE.columns, scopes.c.id).where(scopes.c.name == sa.bindparam("scope_name"))
# The last version that had an entry of this version, of those that were erased since.
_REDACTED_UNTIL = sa.select(sa.func.max(reflections.c.deleted_version)).where(
    reflections.c.scope_id == scopes.c.id,
    reflections.c.erased_version.is_not(None),
    reflections.c.deleted_version > sa.bindparam("version"),
    reflections.c.version <= sa.bindparam("version"),
)
_SCOPE_AT = _SCOPE.add_columns(_REDACTED_UNTIL.scalar_subquery().label("redacted_until"))


def at_version(db: sa.Connection, selection: Selection) -> tuple[Row | None, int]:
    """The scope and the version that a selection is about; None for a scope without writes. Raises UNKNOWN_VERSION and
    SNAPSHOT_REDACTED, and STATE_DAMAGED for a damaged scope."""
    scope = scope_row(db, selection.scope, selection.version)
    return scope, _readable_version(db, selection, scope)


def _readable_version(db: sa.Connection, selection: Selection, scope: Row | None) -> int:
    """`scope` has `redacted_until` where the selection has a version. Raises as `at_version` does."""
    newest = scope.version if scope else 0
    version = newest if selection.version is None else selection.version
    if version > newest:
        message = f"scope {selection.scope!r} is at version {newest}, not yet at {version}"
        raise DomainError(Reason.UNKNOWN_VERSION, message, version=newest)
    if scope is not None and version < newest and (readable := _readable(db, scope, version)) > version:
        message = f"an entry of version {version} of scope {selection.scope!r} was erased; {readable} can be read"
        raise DomainError(Reason.SNAPSHOT_REDACTED, message, version=readable)
    return int(version)


def scope_row(db: sa.Connection, name: str, version: int | None = None) -> Row | None:
    """With a version, also until when it is redacted. Raises STATE_DAMAGED."""
    statement, values = (_SCOPE, {}) if version is None else (_SCOPE_AT, {"version": version})
    row = db.execute(statement, {"scope_name": name, **values}).one_or_none()
    return None if row is None else _sound_scope(db, row, name)


def _sound_scope(db: sa.Connection, row: Row, name: str) -> Row:
    """Raises STATE_DAMAGED."""
    if not (_OF_SCOPE.is_sound(row) and row.name == name):
        raise damage_of(db).error(f"the scope {name!r}")
    return row


def _readable(db: sa.Connection, scope: Row, version: int) -> int:
    """The first version from this one on that had no entry which was erased since."""
    while scope.redacted_until is not None:
        version = scope.redacted_until
        scope = db.execute(_SCOPE_AT, {"scope_name": scope.name, "version": version}).one()
    return version


def find(db: sa.Connection, selection: Selection, order: Order, limit: int) -> Found:
    """The first of the entries that are selected. The first statement finds their standings alone, the second reads the
    rest. Both say what the version had whenever they run, so they need no transaction; after an erasure in between,
    the version is refused."""
    if selection.version is None:
        selection = replace(selection, version=at_version(db, selection)[1])
    assert selection.version is not None
    values = {"scope_name": selection.scope, "limit": limit, **_values(selection, selection.version)}
    found = db.execute(_first(_Filters.of(selection), order), values).all()
    scope = _sound_scope(db, found[0], selection.scope) if found else None
    version = _readable_version(db, selection, scope)
    first = sorted((row for row in found if row.standing is not None), key=ORDERINGS[order].key)[:limit]
    with_id = {row.standing_row: row for row in in_parts(db, _WITH_IDS, [one.standing for one in first])}
    rows = [with_id[one.standing] for one in first if one.standing in with_id]
    if len(rows) < len(first) or any(row.erased_version is not None for row in rows):
        at_version(db, selection)
    return Found(as_then(db, rows), version)


def states_of(
    db: sa.Connection, selection: Selection, scope: Row, version: int, positions: Sequence[int]
) -> dict[int, Row]:
    """Those of the entries that the version selects, by position."""
    values = {"positions": positions, **_values(selection, version)}
    filters = _Filters.of(selection)
    rows: list[Row] = []
    for closed in _parts(version, scope.version):
        rows += db.execute(_of_entries(filters, closed), values).all()
    return {row.position: row for row in rows}


class _Filters(NamedTuple):
    """Which conditions a selection has. Their values are parameters of the statements, which are made once: to make one
    takes longer than to run it."""

    successes_only: bool
    kinds: bool
    key: bool
    tags: int
    task_prefix: bool

    @classmethod
    def of(cls, selection: Selection) -> _Filters:
        kinds, key, prefix = bool(selection.kinds), bool(selection.key), bool(selection.task_prefix)
        return cls(selection.successes_only, kinds, key, len(selection.tags), prefix)

    def conditions(self) -> Iterator[Any]:
        yield standings.c.environment == sa.bindparam("environment")
        yield standings.c.status.in_(sa.bindparam("statuses", expanding=True))
        if self.successes_only:
            yield standings.c.success == sa.true()
        if self.kinds:
            yield reflections.c.kind.in_(sa.bindparam("kinds", expanding=True))
        if self.key:
            yield standings.c.key == sa.bindparam("key")
        for number in range(self.tags):
            yield place_in(standings.c.tags, sa.bindparam(f"tag_{number}", type_=sa.Text)) > 0
        if self.task_prefix:
            yield place_in(reflections.c.task_id, sa.bindparam("task_prefix", type_=Characters)) == 1


def _values(selection: Selection, version: int) -> dict[str, Any]:
    """Of the parameters of its filters, and of the version."""
    found: dict[str, Any] = {
        "version": version,
        "environment": selection.environment,
        "statuses": [status.value for status in selection.statuses],
    }
    if selection.kinds:
        found["kinds"] = [kind.value for kind in selection.kinds]
    if selection.key:
        found["key"] = selection.key
    for number, tag in enumerate(selection.tags):
        found[f"tag_{number}"] = tags.written([tag])
    if selection.task_prefix:
        found["task_prefix"] = selection.task_prefix
    return found


def _parts(version: int, newest: int) -> tuple[bool, ...]:
    """A version's standings are open, or were closed since. Two short queries are faster than one for both."""
    return (False, True) if version < newest else (False,)


def _visible(closed: bool) -> tuple[Any, ...]:
    until = standings.c.until_version
    then = until > sa.bindparam("version") if closed else until.is_(None)
    return then, standings.c.from_version <= sa.bindparam("version")


@lru_cache(_STATEMENTS)
def _first(filters: _Filters, order: Order) -> sa.Select[Any]:
    """The scope, once for each of the first standings, and what orders these. They are those of open rows and as many
    of closed ones."""
    parts = (_first_of(filters, order, closed).subquery() for closed in (False, True))
    first = sa.union_all(*map(sa.select, parts)).subquery()
    columns = (*_OF_SCOPE.columns, scopes.c.id, _REDACTED_UNTIL.scalar_subquery().label("redacted_until"), *first.c)
    joined = scopes.outerjoin(first, sa.true())
    return sa.select(*columns).select_from(joined).where(scopes.c.name == sa.bindparam("scope_name"))


def _first_of(filters: _Filters, order: Order, closed: bool) -> sa.Select[Any]:
    own = scopes.alias()
    scope_id = sa.select(own.c.id).where(own.c.name == sa.bindparam("scope_name")).scalar_subquery()
    ordering = (standings.c[name] for name in ("position", "gain", "lower", "written", "tries"))
    found = sa.select(standings.c.id.label("standing"), *ordering).correlate(None)
    if filters.kinds or filters.task_prefix:
        found = found.join(reflections, reflections.c.position == standings.c.position)
    found = found.where(standings.c.scope_id == scope_id, *filters.conditions(), *_visible(closed))
    by = (_LATEST_OF_FEW if closed and term is LATEST_FIRST else term for term in ORDERINGS[order].by)
    # The limit is a number in the statement: PostgreSQL sees that few rows are read, and keeps the plan.
    return found.order_by(*by).limit(sa.bindparam("limit", type_=sa.Integer, literal_execute=True))


@lru_cache(_STATEMENTS)
def _of_entries(filters: _Filters, closed: bool) -> sa.Select[Any]:
    wanted = STATES.where(*filters.conditions(), *_visible(closed))
    positions: sa.BindParameter[Sequence[int]] = sa.bindparam("positions", expanding=True)
    if closed:
        return wanted.where(standings.c.position.in_(positions))
    return wanted.where(reflections.c.position.in_(positions), standings.c.id == reflections.c.standing_id)


_NEWEST = _NEWEST_STATES.where(reflections.c.reflection_id == sa.bindparam("wanted"))


def newest(db: sa.Connection, reflection_id: str) -> Row:
    """Also of what is damaged. Raises UNKNOWN_REFLECTION."""
    row = db.execute(_NEWEST, {"wanted": reflection_id}).one_or_none()
    if row is None:
        raise DomainError(Reason.UNKNOWN_REFLECTION, f"no reflection {reflection_id!r} here")
    return row


def sound_newest(db: sa.Connection, reflection_id: str) -> Row:
    """Raises UNKNOWN_REFLECTION and STATE_DAMAGED."""
    row = newest(db, reflection_id)
    if cause := damage_in(row):
        raise damage_of(db).error(f"the reflection {reflection_id!r}", cause)
    return row


def damage_in(row: Row) -> str:
    """What is damaged of a row of STATES, or ''."""
    if not ENTRY.is_sound(row):
        return "its provenance differs from its checksum"
    if not (STANDING.is_sound(row) and row.standing_position == row.position):
        return "its status or evidence differs from its checksum"
    if not SCOPE.is_sound(row):
        return "its scope differs from its checksum"
    erased = row.erased_version is not None and row.text_id == 0
    if not erased and not (TEXT.is_sound(row) and row.text_position == row.position):
        return "its text differs from its checksum"
    return ""


def get(db: sa.Connection, reflection_id: str) -> StoredReflection:
    """Raises UNKNOWN_REFLECTION and STATE_DAMAGED."""
    row = sound_newest(db, reflection_id)
    if not (found := as_now(db, [row])):
        raise damage_of(db).error(f"the reflection {reflection_id!r}", "its sources differ from their checksum")
    return found[0]


def page(db: sa.Connection, scope: str, position: int, limit: int, include_deleted: bool) -> Page:
    wanted = _NEWEST_STATES.where(reflections.c.position > position)
    if scope:
        wanted = wanted.where(reflections.c.scope_id == scope_number(scope))
    if not include_deleted:
        wanted = wanted.where(reflections.c.deleted_version.is_(None))
    rows: list[Row] = []
    size, more = 0, False
    with db.execute(wanted.order_by(reflections.c.position).limit(limit + 1).execution_options(yield_per=16)) as found:
        for row in found:
            size += len((row.text or "").encode(errors="replace"))
            if more := bool(rows) and (len(rows) == limit or size > ANSWER_BYTES):
                break
            rows.append(row)
    return Page(as_now(db, rows), rows[-1].position if more else None)


_CHANGE = Section(changes)
_SCOPE_OF_CHANGE = Section(scopes, _CHANGE.end, "scope_", (_CHANGE,))
_CHANGES = sa.select(*_CHANGE.columns, *_SCOPE_OF_CHANGE.columns, changes.c.id).join_from(
    changes, scopes, scopes.c.id == changes.c.scope_id, isouter=True
)


def change_page(db: sa.Connection, scope: str, position: int, limit: int) -> ChangePage:
    """Damaged lines are left out; the log of the service tells them."""
    wanted = _CHANGES.where(changes.c.id > position)
    if scope:
        wanted = wanted.where(changes.c.scope_id == scope_number(scope))
    rows = db.execute(wanted.order_by(changes.c.id).limit(limit + 1)).all()
    found = []
    for row in rows[:limit]:
        if not (_CHANGE.is_sound(row) and _SCOPE_OF_CHANGE.is_sound(row)):
            damage_of(db).tell(f"line {row.id} of the log of writes")
            continue
        change = MemoryChange(
            scope=row.name,
            version=row.version,
            action=row.action,
            reflection_id=row.reflection_id,
            actor=row.actor,
            changed_at=instant(row.changed_microseconds),
            detail=row.detail,
        )
        found.append(change)
    return ChangePage(tuple(found), rows[limit - 1].id if len(rows) > limit else None)


def snapshot(db: sa.Connection, scope: str) -> Snapshot:
    row = scope_row(db, scope)
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


def in_parts(db: sa.Connection, statement: sa.Select[Any], values: Sequence[Any]) -> Iterator[Row]:
    """The rows of a statement with `PART` in it, for any number of values."""
    for start in range(0, len(values), _PART_SIZE):
        yield from db.execute(statement, {PART.key: values[start : start + _PART_SIZE]})


def instant(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def as_then(db: sa.Connection, rows: Rows) -> tuple[StoredReflection, ...]:
    """The entries as they were while they had these standings: not deleted yet."""
    return tuple(replace(one, deleted_version=None) for one in as_now(db, rows))


def as_now(db: sa.Connection, rows: Rows) -> tuple[StoredReflection, ...]:
    """What is damaged is left out; the log tells it."""
    made = [row.position for row in rows if row.source_sum]
    origins = _sources(db, made) if made else {}
    found = []
    for row in rows:
        source_ids = origins.get(row.position, ())
        cause = damage_in(row)
        if not cause and source_sum(source_ids) != row.source_sum:
            cause = "its sources differ from their checksum"
        if cause:
            damage_of(db).tell(f"the reflection {row.reflection_id!r}", cause)
        else:
            found.append(_entry(row, source_ids))
    return tuple(found)


_SOURCES = (
    sa.select(sources.c.position, reflections.c.reflection_id)
    .join(reflections, reflections.c.position == sources.c.source)
    .where(sources.c.position.in_(sa.bindparam("positions", expanding=True)))
    .order_by(sources.c.position, sources.c.place)
)


def _sources(db: sa.Connection, positions: Sequence[int]) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for position, source in db.execute(_SOURCES, {"positions": positions}):
        found[position] = (*found.get(position, ()), source)
    return found


def _entry(row: Row, source_ids: tuple[str, ...]) -> StoredReflection:
    return StoredReflection(
        reflection_id=row.reflection_id,
        scope=row.name,
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
