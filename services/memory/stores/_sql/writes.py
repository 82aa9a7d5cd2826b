"""Writes of entries: add, revise, delete, erase. Each makes a version of its scope."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import ReflectionKind, ReflectionStatus
from mulligan.memory.evidence import Evidence
from mulligan.memory.store import (
    Added,
    NewReflection,
    Revised,
    Rewriting,
    first_status,
    reflection_id,
    request_digest,
    rewritten_status,
    text_digest,
    uplift_of,
)
from mulligan.memory.stores._sql import queries, tags
from mulligan.memory.stores._sql.queries import ENTRY, STANDING, TEXT, Row
from mulligan.memory.stores._sql.sums import Section, damage_of, sealed, source_sum
from mulligan.memory.stores._sql.tables import (
    answered,
    changes,
    evidence,
    reflections,
    scopes,
    sources,
    standings,
    texts,
    uncleaned,
)

_QUARANTINED_COUNTS = 8

# Statements are made once: to make one takes longer than to run it.
_ADD = reflections.insert()
_ADD_TEXT = texts.insert()
_ADD_SOURCES = sources.insert()
_LOG = changes.insert()
_STEP = (
    scopes.update()
    .where(scopes.c.id == sa.bindparam("of"))
    .values({name: sa.bindparam(f"new_{name}") for name in ("version", "entries", "crc")})
)
_OWN = Section(reflections)
_STANDING = Section(standings, _OWN.end, "standing_", (_OWN,))
_NEWEST = (
    sa.select(*_OWN.columns, *_STANDING.columns, standings.c.id)
    .join_from(reflections, standings, standings.c.id == reflections.c.standing_id)
    .where(reflections.c.position.in_(queries.PART))
)
_FIRST = queries.entries_with(
    sa.and_(standings.c.position == reflections.c.position, standings.c.from_version == reflections.c.version)
).where(reflections.c.reflection_id == sa.bindparam("wanted"))
_CLOSE = (
    standings.update()
    .where(standings.c.id == sa.bindparam("of"))
    .values(until_version=sa.bindparam("until"), crc=sa.bindparam("sum"))
)
_OPEN = standings.insert().returning(standings.c.id, standings.c.position)
_POINT = (
    reflections.update()
    .where(reflections.c.position == sa.bindparam("of"))
    .values(standing_id=sa.bindparam("standing"), crc=sa.bindparam("sum"))
)
_EACH = Section(standings)
_ANSWER = Section(answered)
_ANSWERED = Section(reflections, _ANSWER.end, "entry_", (_ANSWER,))


def add(db: sa.Connection, new: NewReflection, embedder: str | None) -> Added:
    identity = reflection_id(new.scope, new.request_id)
    if known := _stored_before(db, identity, new) or _answered_before(db, identity, new):
        return known
    origins = _positions(db, new.scope, new.labels.source_ids)
    origin = new.provenance
    digest = text_digest(origin.environment, new.labels.kind, new.text)
    if new.unless_known and (known := _repeated(db, identity, new, digest)):
        return known
    scope_id, version = next_version(db, new.scope, entries=1)
    status = first_status(new.labels)
    added: dict[str, Any] = {
        "reflection_id": identity,
        "scope_id": scope_id,
        "kind": new.labels.kind.value,
        **{name: getattr(origin, name) for name in origin.__slots__},
        "version": version,
        "created_microseconds": now(),
        "standing_id": 0,
        "source_sum": source_sum(new.labels.source_ids),
    }
    added = {name: value for name, value in sealed(reflections, added).items() if name not in ("position", "crc")}
    position = _key(db.execute(_ADD, added))
    text = {"scope_id": scope_id, "position": position, "text": new.text, "digest": digest, "from_version": version}
    text_id = _open_text(db, text, new.embedding, embedder)
    begun = {
        "position": position,
        "scope_id": scope_id,
        "environment": origin.environment,
        "success": origin.success,
        "gain": origin.reward_after - origin.reward_before,
        "text_id": text_id,
        "revision": 1,
        "evidence_since": 1,
        "status": status.value,
        "key": new.labels.key,
        "tags": tags.written(new.labels.tags),
        **summary(Evidence(), status),
        "written": version,
        "from_version": version,
    }
    _open_standings(db, [sealed(standings, begun)], {position: ({**added, "position": position}, True)})
    if origins:
        rows = [{"position": position, "place": place, "source": source} for place, source in enumerate(origins)]
        db.execute(_ADD_SOURCES, rows)
    log(db, scope_id, version, "add", identity, new.actor)
    return Added(identity, version)


def _stored_before(db: sa.Connection, identity: str, new: NewReflection) -> Added | None:
    """The answer to the first call with this request id, or None. Raises REQUEST_CONFLICT."""
    first = db.execute(_FIRST, {"wanted": identity}).one_or_none()
    if first is None:
        return None
    if cause := queries.damage_in(first):
        raise damage_of(db).error(f"the reflection {identity!r}", cause)
    if first.erased_version is None:
        labels = new.labels
        before = (first.text, queries.provenance(first), first.kind, first.key, tags.read(first.tags))
        same = before == (new.text, new.provenance, labels.kind, labels.key, labels.tags)
        if not (same and queries.get(db, identity).source_ids == labels.source_ids):
            raise _conflict(new)
    return Added(identity, first.version)


def _answered_before(db: sa.Connection, identity: str, new: NewReflection) -> Added | None:
    """The answer to the first call with this request id, if that stored nothing. Raises REQUEST_CONFLICT."""
    wanted = (
        sa.select(*_ANSWER.columns, *_ANSWERED.columns)
        .join_from(answered, reflections, reflections.c.position == answered.c.position, isouter=True)
        .where(answered.c.request == identity)
    )
    first = db.execute(wanted).one_or_none()
    if first is None:
        return None
    if not (_ANSWER.is_sound(first) and _ANSWERED.is_sound(first)):
        raise damage_of(db).error(f"the answer to request {new.request_id!r}")
    if first.content not in ("", request_digest(new)):
        raise _conflict(new)
    return Added(first.reflection_id, first.version)


def _repeated(db: sa.Connection, identity: str, new: NewReflection, digest: str) -> Added | None:
    """The entry that has the text already, if there is one. Then the answer is kept, and the entry was written last. An
    open row of `texts` belongs to an entry that is neither deleted nor erased."""
    wanted = (
        sa.select(reflections.c.position, reflections.c.reflection_id, reflections.c.version)
        .join(texts, texts.c.position == reflections.c.position)
        .where(
            texts.c.scope_id == queries.scope_number(new.scope),
            texts.c.digest == digest,
            texts.c.until_version.is_(None),
        )
        .order_by(reflections.c.position)
        .limit(1)
    )
    found = db.execute(wanted).one_or_none()
    if found is None:
        return None
    queries.sound_newest(db, found.reflection_id)
    queries.scope_row(db, new.scope)
    row = {"request": identity, "position": found.position, "content": request_digest(new)}
    db.execute(answered.insert(), sealed(answered, row))
    scope_id, version = next_version(db, new.scope)
    change_standings(db, version, {found.position: {"written": version}})
    log(db, scope_id, version, "repeat", found.reflection_id, new.actor)
    return Added(found.reflection_id, found.version)


def _conflict(new: NewReflection) -> DomainError:
    message = f"request {new.request_id!r} stored another reflection in scope {new.scope!r}"
    return DomainError(Reason.REQUEST_CONFLICT, message)


def _positions(db: sa.Connection, scope: str, identities: Sequence[str]) -> list[int]:
    """Raises UNKNOWN_REFLECTION."""
    wanted = sa.select(reflections.c.reflection_id, reflections.c.position).where(
        reflections.c.reflection_id.in_(identities), reflections.c.scope_id == queries.scope_number(scope)
    )
    found = dict(db.execute(wanted).tuples().all()) if identities else {}
    for identity in identities:
        if identity not in found:
            raise DomainError(Reason.UNKNOWN_REFLECTION, f"no reflection {identity!r} in scope {scope!r}")
    return [found[identity] for identity in identities]


def revise(db: sa.Connection, rewriting: Rewriting, embedder: str | None) -> Revised:
    old = queries.sound_newest(db, rewriting.reflection_id)
    if answer := _checked(db, old, rewriting):
        return answer
    _, version = next_version(db, old.name)
    revision = old.revision + 1
    given = [name for name in ("text", "key", "tags", "status") if getattr(rewriting, name) is not None]
    status = rewriting.status or ReflectionStatus(old.status)
    rewritten = rewriting.text not in (None, old.text)
    if rewritten:
        status = rewritten_status(status)
    changed: dict[str, Any] = {"revision": revision, "status": status.value}
    if rewritten:
        changed["written"] = version
    if rewriting.key is not None:
        changed["key"] = rewriting.key
    if rewriting.tags is not None:
        changed["tags"] = tags.written(rewriting.tags)
    if rewriting.text is not None:
        _rewrite(db, texts.c.id == old.text_id, TEXT, old, until_version=version)
        text = {
            "scope_id": old.scope_id,
            "position": old.position,
            "text": rewriting.text,
            "digest": text_digest(old.environment, old.kind, rewriting.text),
            "from_version": version,
        }
        changed["text_id"] = _open_text(db, text, rewriting.embedding, embedder)
    if rewritten or rewriting.status is ReflectionStatus.CANDIDATE:
        db.execute(evidence.delete().where(evidence.c.position == old.position))
        changed |= {"evidence_since": revision, **summary(Evidence(), status)}
    else:
        changed["tries"] = _tries(old.uses_shown + old.uses_left_out, status)
    made = {"revised_by": rewriting.request_id, "revised_version": version}
    change_standings(db, version, {old.position: changed}, made)
    log(db, old.scope_id, version, "revise", old.reflection_id, rewriting.actor, ", ".join(given))
    return Revised(revision, version)


def _checked(db: sa.Connection, old: Row, rewriting: Rewriting) -> Revised | None:
    """The answer to the same call before, if that made the newest revision. Raises what `Store.revise` does."""
    if old.deleted_version is not None:
        raise DomainError(Reason.UNKNOWN_REFLECTION, f"reflection {old.reflection_id!r} was deleted")
    if old.revised_by == rewriting.request_id:
        before = (old.text, old.key, tags.read(old.tags))
        again = (rewriting.text, rewriting.key, rewriting.tags)
        if any(new not in (None, known) for known, new in zip(before, again, strict=True)):
            message = f"request {rewriting.request_id!r} rewrote reflection {old.reflection_id!r} in another way"
            raise DomainError(Reason.REQUEST_CONFLICT, message)
        return Revised(old.revision, old.revised_version)
    if rewriting.text is not None and old.kind == ReflectionKind.EPISODE.value:
        raise DomainError(Reason.RAW_ENTRY, f"reflection {old.reflection_id!r} is an episode: its text stays as it is")
    _check_revision(old, rewriting.expected_revision)
    return None


def _check_revision(old: Row, expected: int) -> None:
    """Raises REVISION_CONFLICT."""
    if expected != old.revision:
        message = f"reflection {old.reflection_id!r} is at revision {old.revision}, not {expected}"
        raise DomainError(Reason.REVISION_CONFLICT, message, revision=old.revision)


def delete(db: sa.Connection, identity: str, actor: str, expected_revision: int) -> int:
    old = queries.newest(db, identity)
    if old.deleted_version is not None:
        return int(old.deleted_version)
    _check_revision(old, expected_revision or old.revision)
    scope_id, version = next_version(db, old.name, entries=-1)
    _close(db, old, version)
    _rewrite(db, reflections.c.position == old.position, ENTRY, old, deleted_version=version)
    log(db, scope_id, version, "delete", identity, actor)
    return version


def erase(db: sa.Connection, identity: str, actor: str, expected_revision: int) -> int:
    """The bytes are gone from the tables; `uncleaned` says that the store has to clean its files."""
    old = queries.newest(db, identity)
    if old.erased_version is not None:
        return int(old.erased_version)
    _check_revision(old, expected_revision or old.revision)
    kept = old.deleted_version is None
    scope_id, version = next_version(db, old.name, entries=-1 if kept else 0)
    if kept:
        _close(db, old, version)
    gone = {"erased_version": version, "deleted_version": version if kept else old.deleted_version}
    _rewrite(db, reflections.c.position == old.position, ENTRY, old, **gone)
    db.execute(texts.delete().where(texts.c.position == old.position))
    for row in db.execute(sa.select(*_EACH.columns, standings.c.id).where(standings.c.position == old.position)).all():
        _rewrite(db, standings.c.id == row.id, _EACH, row, key="", tags="", text_id=0)
    for row in db.execute(sa.select(*_ANSWER.columns).where(answered.c.position == old.position)).all():
        _rewrite(db, answered.c.request == row.request, _ANSWER, row, content="")
    db.execute(uncleaned.insert().values(reflection_id=identity))
    log(db, scope_id, version, "erase", identity, actor)
    return version


def all_uncleaned(db: sa.Connection) -> Sequence[str]:
    """Ids of erased entries of which files may still have bytes."""
    return db.execute(sa.select(uncleaned.c.reflection_id)).scalars().all()


def cleaned(db: sa.Connection, identities: Sequence[str]) -> None:
    db.execute(uncleaned.delete().where(uncleaned.c.reflection_id.in_(identities)))


def next_version(db: sa.Connection, scope: str, entries: int = 0) -> tuple[int, int]:
    """The scope's id and its new version. `entries` is what the write adds to their number. Writes take turns
    until their transaction ends, so versions have no gaps. Raises STATE_DAMAGED, and writes nothing."""
    row = queries.scope_row(db, scope)
    if row is None:
        new = sealed(scopes, {"name": scope, "version": 1, "entries": entries})
        return _key(db.execute(scopes.insert(), new)), 1
    step = sealed(scopes, {"name": scope, "version": row.version + 1, "entries": row.entries + entries})
    changed = {f"new_{name}": step[name] for name in ("version", "entries", "crc")}
    db.execute(_STEP, {"of": row.id, **changed})
    return row.id, step["version"]


def log(
    db: sa.Connection, scope_id: int, version: int, action: str, identity: str, actor: str, detail: str = ""
) -> None:
    row = {"scope_id": scope_id, "version": version, "action": action, "reflection_id": identity, "actor": actor}
    db.execute(_LOG, sealed(changes, {**row, "changed_microseconds": now(), "detail": detail}))


def change_standings(
    db: sa.Connection, version: int, changed: Mapping[int, dict[str, Any]], made: Mapping[str, Any] | None = None
) -> None:
    """Of each entry, by position: closes the newest standing and opens one that differs in what changed. That of a
    deleted entry is open in no version. `made` changes the entry itself."""
    opened, closed = [], []
    entries: dict[int, tuple[dict[str, Any], bool]] = {}
    for old in queries.in_parts(db, _NEWEST, list(changed)):
        kept, sound = _STANDING.values(old), _STANDING.is_sound(old)
        entries[old.position] = (_OWN.values(old) | dict(made or {}), _OWN.is_sound(old))
        is_open = old.until_version is None
        if is_open:
            crc = sealed(standings, {**kept, "until_version": version}, sound=sound)["crc"]
            closed.append({"of": old.id, "until": version, "sum": crc})
        versions = {"from_version": version, "until_version": None if is_open else version}
        opened.append(sealed(standings, {**kept, **changed[old.position], **versions}, sound=sound))
    if closed:
        db.execute(_CLOSE, closed)
    _open_standings(db, opened, entries)
    if made:
        db.execute(reflections.update().where(reflections.c.position.in_(list(entries))).values(**made))


def _open_standings(
    db: sa.Connection, rows: Sequence[dict[str, Any]], entries: Mapping[int, tuple[dict[str, Any], bool]]
) -> None:
    """`entries`: those of the rows, by position, and whether they are not damaged."""
    if not rows:
        return
    points = []
    for standing_id, position in db.execute(_OPEN, rows).all():
        entry, sound = entries[position]
        crc = sealed(reflections, {**entry, "standing_id": standing_id}, sound=sound)["crc"]
        points.append({"standing": standing_id, "of": position, "sum": crc})
    db.execute(_POINT, points)


def _rewrite(db: sa.Connection, which: Any, section: Section, old: Row, **changed: Any) -> None:
    """Changes columns of one row. A damaged one stays damaged."""
    new = sealed(section.table, {**section.values(old), **changed}, sound=section.is_sound(old))
    db.execute(section.table.update().where(which).values({name: new[name] for name in (*changed, "crc")}))


def summary(of: Evidence, status: ReflectionStatus) -> dict[str, Any]:
    """What a standing has of the evidence."""
    uplift = uplift_of(of)
    if uplift is None:
        none = dict.fromkeys(("uses_shown", "uses_left_out", "tries"), 0)
        return {**none, "mean_shown": 0.0, "mean_left_out": 0.0, "uplift": None, "lower": -1.0, "upper": 1.0}
    return {
        **{name: getattr(uplift, name) for name in uplift.__slots__},
        "tries": _tries(uplift.uses_shown + uplift.uses_left_out, status),
    }


def _tries(uses: int, status: ReflectionStatus) -> int:
    return uses * (_QUARANTINED_COUNTS if status is ReflectionStatus.QUARANTINED else 1)


def _close(db: sa.Connection, old: Row, version: int) -> None:
    _rewrite(db, standings.c.id == old.standing_id, STANDING, old, until_version=version)
    _rewrite(db, texts.c.id == old.text_id, TEXT, old, until_version=version)


def _open_text(db: sa.Connection, row: Mapping[str, Any], embedding: Sequence[float], embedder: str | None) -> int:
    embedded = {"embedding": list(embedding), "embedder": embedder} if len(embedding) else {}
    return _key(db.execute(_ADD_TEXT, sealed(texts, {**row, **embedded})))


def _key(inserted: sa.CursorResult[Any]) -> int:
    assert inserted.inserted_primary_key is not None
    return int(inserted.inserted_primary_key[0])


def now() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000
