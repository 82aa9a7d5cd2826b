"""Uses of entries and their rewards, and what follows for the evidence and status of the entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import RecordedUse, ReflectionStatus, UseOutcome
from mulligan.memory.evidence import Evidence
from mulligan.memory.store import DrawnUse, action_of, evidence_in, status_after
from mulligan.memory.stores._sql import queries, writes
from mulligan.memory.stores._sql.tables import evidence, reflections, scopes, standings, used_entries, uses


def record_uses(db: sa.Connection, drawn: Sequence[DrawnUse]) -> None:
    known = _drawn(db, [use.use_id for use in drawn])
    new: dict[str, DrawnUse] = {}
    for use in drawn:
        before = known.get(use.use_id) or new.setdefault(use.use_id, use)
        if (before.entries, before.left_out_id) != (use.entries, use.left_out_id):
            raise DomainError(Reason.REQUEST_CONFLICT, f"use {use.use_key!r} was drawn for other entries")
    if not new:
        return
    entries = _positions(db, new.values())
    rows = []
    for use in new.values():
        left_out = entries[use.scope, use.left_out_id] if use.left_out_id else None
        row = {"use_id": use.use_id, "scope": use.scope, "use_key": use.use_key, "left_out": left_out}
        rows.append({**row, "holdout": use.holdout, "drawn_microseconds": writes.now()})
    in_scope = sa.select(scopes.c.id).where(scopes.c.name == sa.bindparam("scope")).scalar_subquery()
    db.execute(uses.insert().values(scope_id=in_scope), rows)
    numbers = dict(db.execute(sa.select(uses.c.use_id, uses.c.id).where(uses.c.use_id.in_(list(new)))).tuples().all())
    used = [
        {"use": numbers[use.use_id], "place": place, "position": entries[use.scope, identity], "revision": revision}
        for use in new.values()
        for place, (identity, revision) in enumerate(use.entries)
    ]
    if used:
        db.execute(used_entries.insert(), used)


def _positions(db: sa.Connection, drawn: Iterable[DrawnUse]) -> dict[tuple[str, str], int]:
    """Of the entries, by scope and id. Raises UNKNOWN_REFLECTION."""
    wanted = {(use.scope, identity): None for use in drawn for identity, _ in use.entries}
    rows = db.execute(
        sa.select(scopes.c.name, reflections.c.reflection_id, reflections.c.position)
        .join(scopes, scopes.c.id == reflections.c.scope_id)
        .where(reflections.c.reflection_id.in_([identity for _, identity in wanted]))
    )
    found = {(scope, identity): position for scope, identity, position in rows}
    for scope, identity in wanted:
        if (scope, identity) not in found:
            raise DomainError(Reason.UNKNOWN_REFLECTION, f"no reflection {identity!r} in scope {scope!r}")
    return found


def _drawn(db: sa.Connection, use_ids: Sequence[str]) -> dict[str, DrawnUse]:
    """The stored ones of these uses, by id, in the order in which they are named."""
    entry, left_out = reflections.alias(), reflections.alias()
    rows = db.execute(
        sa.select(
            *(uses.c.use_id, uses.c.use_key, uses.c.holdout, used_entries.c.revision, entry.c.reflection_id),
            left_out.c.reflection_id.label("left_out_id"),
            scopes.c.name.label("scope"),
        )
        .join(scopes, scopes.c.id == uses.c.scope_id)
        .join(used_entries, used_entries.c.use == uses.c.id)
        .join(entry, entry.c.position == used_entries.c.position)
        .outerjoin(left_out, left_out.c.position == uses.c.left_out)
        .where(uses.c.use_id.in_(use_ids))
        .order_by(used_entries.c.use, used_entries.c.place)
    ).all()
    found: dict[str, list[sa.Row[tuple[str, str, float, int, str, str, str]]]] = {}
    for row in rows:
        found.setdefault(row.use_id, []).append(row)
    return {
        use_id: DrawnUse(
            use_id=use_id,
            use_key=of_use[0].use_key,
            scope=of_use[0].scope,
            entries=tuple((row.reflection_id, row.revision) for row in of_use),
            left_out_id=of_use[0].left_out_id or "",
            holdout=of_use[0].holdout,
        )
        for use_id in dict.fromkeys(use_ids)
        if (of_use := found.get(use_id))
    }


def report(db: sa.Connection, outcomes: Sequence[UseOutcome], actor: str) -> int:
    rewards: dict[str, float] = {}
    for outcome in outcomes:
        rewards.setdefault(outcome.use_id, outcome.reward)
    stored = sa.select(uses.c.use_id, uses.c.reward).where(uses.c.use_id.in_(list(rewards)))
    before = dict(db.execute(stored).tuples().all())
    for use_id in rewards:
        if use_id not in before:
            raise DomainError(Reason.UNKNOWN_USE, f"no use {use_id!r} here", use_id=use_id)
    new = {use_id: reward for use_id, reward in rewards.items() if before[use_id] is None}
    if not new:
        return 0
    rewarded = uses.update().where(uses.c.use_id == sa.bindparam("use")).values(reward=sa.bindparam("earned"))
    db.execute(rewarded, [{"use": use_id, "earned": reward} for use_id, reward in new.items()])
    by_scope: dict[str, list[DrawnUse]] = {}
    for use in _drawn(db, list(new)).values():
        by_scope.setdefault(use.scope, []).append(use)
    for scope, counted in by_scope.items():
        scope_id, version = writes.next_version(db, scope)
        writes.log(db, scope_id, version, "report", "", actor, f"{len(counted)} uses")
        _learn(db, scope_id, version, [(use, new[use.use_id]) for use in counted], actor)
    return len(new)


def _learn(
    db: sa.Connection, scope_id: int, version: int, counted: Sequence[tuple[DrawnUse, float]], actor: str
) -> None:
    """Adds the uses to the evidence of their entries."""
    entries = _entries(db, {identity for use, _ in counted for identity, _ in use.entries})
    known = {row.reflection_id: Evidence.from_bytes(row.state) if row.state else Evidence() for row in entries.values()}
    changed: dict[str, None] = {}
    for use, reward in counted:
        for identity, revision, shown, p_out in evidence_in(use):
            if revision >= entries[identity].evidence_since:
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
        db.execute(evidence.delete().where(evidence.c.position.in_(list(standing))))
        db.execute(evidence.insert(), states)


def _entries(db: sa.Connection, identities: Iterable[str]) -> dict[str, sa.Row[tuple[str, int, str, int, bytes]]]:
    wanted = (
        sa.select(
            reflections.c.reflection_id,
            reflections.c.position,
            standings.c.status,
            standings.c.evidence_since,
            evidence.c.state,
        )
        .join(standings, standings.c.id == reflections.c.standing_id)
        .outerjoin(evidence, evidence.c.position == reflections.c.position)
        .where(reflections.c.reflection_id.in_(list(identities)))
    )
    return {row.reflection_id: row for row in db.execute(wanted)}


def scopes_of_uses(db: sa.Connection, use_ids: Sequence[str]) -> Sequence[str]:
    named = sa.select(scopes.c.name).distinct().join(uses, uses.c.scope_id == scopes.c.id)
    return db.execute(named.where(uses.c.use_id.in_(use_ids)).order_by(scopes.c.name)).scalars().all()


def uses_of(db: sa.Connection, reflection_id: str, limit: int) -> Sequence[RecordedUse]:
    position = queries.newest(db, reflection_id).position
    rows = db.execute(
        sa.select(uses, used_entries.c.revision)
        .join(used_entries, used_entries.c.use == uses.c.id)
        .where(used_entries.c.position == position)
        .order_by(used_entries.c.use.desc())
        .limit(limit)
    )
    return tuple(
        RecordedUse(
            use_id=row.use_id,
            use_key=row.use_key,
            shown=row.left_out != position,
            revision=row.revision,
            holdout=row.holdout,
            reward=row.reward,
            drawn_at=queries.instant(row.drawn_microseconds),
        )
        for row in rows
    )
