"""Uses of entries and their rewards, and what follows for the evidence and status of the entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import sqlalchemy as sa

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import RecordedUse, ReflectionStatus, UseOutcome
from mulligan.memory.evidence import Evidence
from mulligan.memory.store import DrawnUse, action_of, evidence_in, status_after
from mulligan.memory.stores._sql import queries, writes
from mulligan.memory.stores._sql.sums import Section, damage_of, sealed
from mulligan.memory.stores._sql.tables import evidence, reflections, scopes, standings, used_entries, uses

_USE = Section(uses)
_SCOPE = Section(scopes, _USE.end, "scope_", (_USE,))
_ENTRY = Section(reflections)
_STANDING = Section(standings, _ENTRY.end, "standing_", (_ENTRY,))


class _Drawn(NamedTuple):
    """A use that is stored."""

    use: DrawnUse
    values: dict[str, Any]  # of its row
    entries: list[tuple[int, int]]  # positions and revisions
    sound: bool


def record_uses(db: sa.Connection, drawn: Sequence[DrawnUse]) -> None:
    known = _drawn(db, [use.use_id for use in drawn])
    new: dict[str, DrawnUse] = {}
    for use in drawn:
        stored = known.get(use.use_id)
        if stored is not None and not stored.sound:
            raise damage_of(db).error(f"the use {use.use_id!r}")
        before = stored.use if stored is not None else new.setdefault(use.use_id, use)
        if (before.entries, before.left_out_id) != (use.entries, use.left_out_id):
            raise DomainError(Reason.REQUEST_CONFLICT, f"use {use.use_key!r} was drawn for other entries")
    if not new:
        return
    entries = _positions(db, new.values())
    numbers = {name: _scope_id(db, name) for name in {use.scope for use in new.values()}}
    of_use = {
        use.use_id: [(entries[use.scope, identity], revision) for identity, revision in use.entries]
        for use in new.values()
    }
    rows = []
    for use in new.values():
        left_out = entries[use.scope, use.left_out_id] if use.left_out_id else None
        row = {"use_id": use.use_id, "scope_id": numbers[use.scope], "use_key": use.use_key, "left_out": left_out}
        times = {"holdout": use.holdout, "drawn_microseconds": writes.now()}
        rows.append(sealed(uses, {**row, **times}, of_use[use.use_id]))
    db.execute(uses.insert(), rows)
    ids = dict(db.execute(sa.select(uses.c.use_id, uses.c.id).where(uses.c.use_id.in_(list(new)))).tuples().all())
    used = [
        {"use": ids[use_id], "place": place, "position": position, "revision": revision}
        for use_id, pairs in of_use.items()
        for place, (position, revision) in enumerate(pairs)
    ]
    if used:
        db.execute(used_entries.insert(), used)


def _scope_id(db: sa.Connection, name: str) -> int | None:
    """Raises STATE_DAMAGED."""
    row = queries.scope_row(db, name)
    return None if row is None else int(row.id)


_POSITIONS = (
    sa.select(scopes.c.name, reflections.c.reflection_id, reflections.c.position)
    .join(scopes, scopes.c.id == reflections.c.scope_id)
    .where(reflections.c.reflection_id.in_(queries.PART))
)


def _positions(db: sa.Connection, drawn: Iterable[DrawnUse]) -> dict[tuple[str, str], int]:
    """Of the entries, by scope and id. Raises UNKNOWN_REFLECTION."""
    wanted = {(use.scope, identity): None for use in drawn for identity, _ in use.entries}
    rows = queries.in_parts(db, _POSITIONS, [identity for _, identity in wanted])
    found = {(scope, identity): position for scope, identity, position in rows}
    for scope, identity in wanted:
        if (scope, identity) not in found:
            raise DomainError(Reason.UNKNOWN_REFLECTION, f"no reflection {identity!r} in scope {scope!r}")
    return found


def _drawn(db: sa.Connection, use_ids: Sequence[str]) -> dict[str, _Drawn]:
    """The stored ones of these uses, by id, in the order in which they are named; also damaged ones."""
    entry, left_out = reflections.alias(), reflections.alias()
    rows = db.execute(
        sa.select(
            *(*_USE.columns, *_SCOPE.columns, used_entries.c.position, used_entries.c.revision),
            *(entry.c.reflection_id, left_out.c.reflection_id.label("left_out_id")),
        )
        .select_from(uses)
        .outerjoin(scopes, scopes.c.id == uses.c.scope_id)
        .outerjoin(used_entries, used_entries.c.use == uses.c.id)
        .outerjoin(entry, entry.c.position == used_entries.c.position)
        .outerjoin(left_out, left_out.c.position == uses.c.left_out)
        .where(uses.c.use_id.in_(use_ids))
        .order_by(used_entries.c.use, used_entries.c.place)
    ).all()
    found: dict[str, list[sa.Row[Any]]] = {}
    for row in rows:
        found.setdefault(row.use_id, []).append(row)
    return {use_id: _of_rows(found[use_id]) for use_id in dict.fromkeys(use_ids) if use_id in found}


def _of_rows(rows: Sequence[sa.Row[Any]]) -> _Drawn:
    first = rows[0]
    entries = [row for row in rows if row.position is not None]
    pairs = [(row.position, row.revision) for row in entries]
    whole = all(row.reflection_id is not None for row in entries)
    use = DrawnUse(
        use_id=first.use_id,
        use_key=first.use_key,
        scope=first.name,
        entries=tuple((row.reflection_id, row.revision) for row in entries),
        left_out_id=first.left_out_id or "",
        holdout=first.holdout,
    )
    return _Drawn(use, _USE.values(first), pairs, whole and _USE.is_sound(first, pairs) and _SCOPE.is_sound(first))


def report(db: sa.Connection, outcomes: Sequence[UseOutcome], actor: str) -> int:
    rewards: dict[str, float] = {}
    for outcome in outcomes:
        rewards.setdefault(outcome.use_id, outcome.reward)
    before = _drawn(db, list(rewards))
    for use_id in rewards:
        if use_id not in before:
            raise DomainError(Reason.UNKNOWN_USE, f"no use {use_id!r} here", use_id=use_id)
    new: dict[str, float] = {}
    by_scope: dict[str, list[DrawnUse]] = {}
    for use_id, reward in rewards.items():
        if not before[use_id].sound:
            damage_of(db).tell(f"the use {use_id!r}")
        elif before[use_id].values["reward"] is None:
            new[use_id] = reward
            by_scope.setdefault(before[use_id].use.scope, []).append(before[use_id].use)
    if not new:
        return 0
    for scope in by_scope:  # before anything is written
        queries.scope_row(db, scope)
    _reward(db, new, before)
    for scope, counted in by_scope.items():
        scope_id, version = writes.next_version(db, scope)
        writes.log(db, scope_id, version, "report", "", actor, f"{len(counted)} uses")
        _learn(db, scope_id, version, [(use, new[use.use_id]) for use in counted], actor)
    return len(new)


def _reward(db: sa.Connection, new: Mapping[str, float], before: Mapping[str, _Drawn]) -> None:
    changed = []
    for use_id, reward in new.items():
        row = sealed(uses, {**before[use_id].values, "reward": reward}, before[use_id].entries)
        changed.append({"of": use_id, "earned": row["reward"], "sum": row["crc"]})
    values: dict[str, Any] = {"reward": sa.bindparam("earned"), "crc": sa.bindparam("sum")}
    db.execute(uses.update().where(uses.c.use_id == sa.bindparam("of")).values(**values), changed)


def _learn(
    db: sa.Connection, scope_id: int, version: int, counted: Sequence[tuple[DrawnUse, float]], actor: str
) -> None:
    """Adds the uses to the evidence of their entries, but for damaged ones, which the log tells."""
    entries = _entries(db, {identity for use, _ in counted for identity, _ in use.entries})
    known = _evidence(db, entries)
    changed: dict[str, None] = {}
    for use, reward in counted:
        for identity, revision, shown, p_out in evidence_in(use):
            if identity in known and revision >= entries[identity].evidence_since:
                known[identity].add(reward, shown=shown, p_out=p_out)
                changed[identity] = None
    standing: dict[int, dict[str, Any]] = {}
    for identity in changed:
        entry, now_known = entries[identity], known[identity]
        before = ReflectionStatus(entry.status)
        status = status_after(before, helpful=now_known.helpful, harmful=now_known.harmful)
        standing[entry.position] = {"status": status.value, **writes.summary(now_known, status)}
        if status is not before:
            writes.log(db, scope_id, version, action_of(status), identity, actor)
    if standing:
        writes.change_standings(db, version, standing)
        states = [{"position": entries[one].position, "state": known[one].to_bytes()} for one in changed]
        db.execute(_FORGET, [{"of": position} for position in standing])
        db.execute(evidence.insert(), states)


_FORGET = evidence.delete().where(evidence.c.position == sa.bindparam("of"))


def _evidence(db: sa.Connection, entries: Mapping[str, sa.Row[Any]]) -> dict[str, Evidence]:
    """Of the entries that are not damaged."""
    found: dict[str, Evidence] = {}
    for identity, row in entries.items():
        try:
            known = Evidence.from_bytes(row.state) if row.state is not None else Evidence()
        except (ValueError, TypeError) as error:
            damage_of(db).tell(f"the evidence of the reflection {identity!r}", str(error))
            continue
        of_standing = (row.uses_shown, row.uses_left_out)
        if not (_ENTRY.is_sound(row) and _STANDING.is_sound(row) and row.standing_position == row.position):
            damage_of(db).tell(f"the reflection {identity!r}")
        elif (known.uses_shown, known.uses_left_out) != of_standing:
            damage_of(db).tell(f"the evidence of the reflection {identity!r}", "it has other uses than the reflection")
        else:
            found[identity] = known
    return found


_WITH_EVIDENCE = (
    sa.select(*_ENTRY.columns, *_STANDING.columns, evidence.c.state)
    .select_from(reflections)
    .outerjoin(standings, standings.c.id == reflections.c.standing_id)
    .outerjoin(evidence, evidence.c.position == reflections.c.position)
    .where(reflections.c.reflection_id.in_(queries.PART))
)


def _entries(db: sa.Connection, identities: Iterable[str]) -> dict[str, sa.Row[Any]]:
    return {row.reflection_id: row for row in queries.in_parts(db, _WITH_EVIDENCE, list(identities))}


def scopes_of_uses(db: sa.Connection, use_ids: Sequence[str]) -> Sequence[str]:
    named = sa.select(scopes.c.name).distinct().join(uses, uses.c.scope_id == scopes.c.id)
    return db.execute(named.where(uses.c.use_id.in_(use_ids)).order_by(scopes.c.name)).scalars().all()


def uses_of(db: sa.Connection, reflection_id: str, limit: int) -> Sequence[RecordedUse]:
    """Without damaged ones, which the log tells."""
    position = queries.sound_newest(db, reflection_id).position
    latest = sa.select(used_entries.c.use).where(used_entries.c.position == position)
    of_latest = latest.order_by(used_entries.c.use.desc()).limit(limit).subquery()
    rows = db.execute(
        sa.select(*_USE.columns, used_entries.c.position, used_entries.c.revision, used_entries.c.use)
        .join_from(of_latest, used_entries, used_entries.c.use == of_latest.c.use)
        .outerjoin(uses, uses.c.id == used_entries.c.use)
        .order_by(used_entries.c.use.desc(), used_entries.c.place)
    )
    found = []
    for use, group in groupby(rows, lambda row: int(row.use)):
        of_use = list(group)
        first = of_use[0]
        if not _USE.is_sound(first, [(row.position, row.revision) for row in of_use]):
            damage_of(db).tell(f"the use {use}" if first.use_id is None else f"the use {first.use_id!r}")
            continue
        recorded = RecordedUse(
            use_id=first.use_id,
            use_key=first.use_key,
            shown=first.left_out != position,
            revision=next(row.revision for row in of_use if row.position == position),
            holdout=first.holdout,
            reward=first.reward,
            drawn_at=queries.instant(first.drawn_microseconds),
        )
        found.append(recorded)
    return tuple(found)
