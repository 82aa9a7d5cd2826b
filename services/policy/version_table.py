"""The records of a policy's versions, in a SQLite database of one table.

`crc` is the checksum of all other columns of a row (`row_sums.py`). A damaged record costs its version: when the
database is opened, the version is recorded as removed, with the damage as its problem, and the newest that is kept
serves in its place if it may have been the one that served. The database as it was is kept beside it. A record that is
damaged later is left out of answers until then, or refused by name.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from mulligan.common.disk import folder_removed, writing_to
from mulligan.common.inference import CanaryProbe, PolicyVersion, VersionState, WeightsKind
from mulligan.common.row_sums import RowDamage, any_text, is_damage, is_sound, row_sum, structure_problems

log = structlog.get_logger()
_SCHEMA = 2
_NAMES = (
    *("policy_version", "origin", "source", "setup", "kind", "state", "sha256", "fingerprint", "created_at", "problem"),
    *("canary_difference", "engine_checksum", "model", "canary"),
)
_COLUMNS = ", ".join(_NAMES)
_SELECT = f"SELECT {_COLUMNS}, crc FROM records"
_TABLE = """CREATE TABLE records (
    policy_version INTEGER PRIMARY KEY,
    origin INTEGER NOT NULL,
    source TEXT NOT NULL,
    setup TEXT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    created_at TEXT NOT NULL,
    problem TEXT NOT NULL,
    canary_difference REAL,
    engine_checksum TEXT NOT NULL,
    model TEXT NOT NULL,
    canary TEXT NOT NULL,
    crc INTEGER
)"""
_ONE_SERVES = "CREATE UNIQUE INDEX one_serves ON records (state) WHERE state = 'serving'"
_OF_A_MODEL = "CREATE INDEX of_a_model ON records (origin)"
_MOST = 2**62  # a greater number is a damaged one
_ADVICE = "Put a copy of the file back, or move it away: then the policy serves the weights that its model comes with."
_LOST = "its record in {} was damaged: what it said is lost"


class DamagedTable(OSError):
    """The file is no database, or one whose structure is damaged. The message says what to do."""


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """What is known of a version.

    `origin` is the version of the weights that its model came with, so it is the same for all versions of one loaded
    model. `source` names that model (`source_of`). Checksums of engines can be compared where `setup` is equal.
    """

    version: PolicyVersion
    origin: int
    source: str
    setup: str
    canary: tuple[CanaryProbe, ...] = ()

    @property
    def number(self) -> int:
        return self.version.policy_version

    @property
    def is_lost(self) -> bool:
        """Whether its record was damaged: then nothing but its number is known."""
        return self.version.kind is not WeightsKind.ORIGINAL and not self.version.sha256

    def now(self, **changes: Any) -> VersionRecord:
        """With these fields of the version changed."""
        return replace(self, version=replace(self.version, **changes))


class VersionTable:
    """Calls read the database while one thread writes a transaction. Raises OSError when the database cannot be used.
    Reads raise DomainError STATE_DAMAGED where the file's structure is damaged."""

    def __init__(self, path: Path):
        self._path = path
        self._damage = RowDamage(path, _ADVICE)
        self._lock = threading.Lock()
        self._db = _open(path)
        try:
            self._mend()
        except sqlite3.Error as error:
            self._db.close()
            raise _unusable(path, error) from error
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def greatest(self) -> int:
        """Of all numbers that are known; -1 where there is none."""
        [(found,)] = self._query("SELECT max(policy_version) FROM records WHERE policy_version < ?", _MOST)
        return -1 if found is None else int(found)

    def get(self, number: int) -> VersionRecord | None:
        """Raises DomainError STATE_DAMAGED."""
        for row in self._query(f"{_SELECT} WHERE policy_version = ?", number):
            if (record := _record(row)) is None:
                raise self._damage.error(_name(row))
            return record
        return None

    def records(self, clause: str, *values: object) -> list[VersionRecord]:
        """Those that are not damaged; the log tells which are."""
        found = []
        for row in self._query(f"{_SELECT} {clause}", *values):
            if (record := _record(row)) is None:
                self._damage.tell(_name(row))
            else:
                found.append(record)
        return found

    def with_files(self) -> Iterator[int]:
        """Numbers of the versions that have files, or may have some: their record is damaged."""
        for row in self._query(_SELECT):
            record = _record(row)
            if record is None or record.version.state in (VersionState.SERVING, VersionState.KEPT):
                yield row[0]

    @contextmanager
    def transaction(self) -> Iterator[VersionTable]:
        """Changes of several records, all or none. Raises DomainError DISK_FULL, FOLDER_REMOVED and STATE_DAMAGED."""
        folder = self._path.parent
        # The innermost but one commits, or rolls back on an exception.
        with writing_to(folder), self._lock, self._told(), self._db:
            if not self._path.exists():
                raise folder_removed(folder)
            self._db.execute("BEGIN IMMEDIATE")
            yield self

    def put(self, record: VersionRecord) -> None:
        """In a transaction."""
        self._write(_row(record))

    def change(self, clause: str, *values: object, **changes: str) -> None:
        """In a transaction: changes columns of records. One that is damaged stays so."""
        for row in self._db.execute(f"{_SELECT} {clause}", values).fetchall():
            changed = {**dict(zip(_NAMES, row, strict=False)), **changes}
            self._write(tuple(changed.values()), sound=_record(row) is not None)

    def _write(self, row: Sequence[Any], *, sound: bool = True) -> None:
        given = ", ".join(f"{name} = excluded.{name}" for name in (*_NAMES, "crc"))
        places = ", ".join("?" * (len(row) + 1))
        insert = f"INSERT INTO records ({_COLUMNS}, crc) VALUES ({places})"
        crc = row_sum(row) if sound else None
        self._db.execute(f"{insert} ON CONFLICT (policy_version) DO UPDATE SET {given}", (*row, crc))

    def _query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock, self._told():
            return self._db.execute(statement, values).fetchall()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if is_damage(error):
                raise self._damage.of_file(error) from error
            raise

    def _mend(self) -> None:
        """Records versions whose records are damaged as removed."""
        rows = self._query(_SELECT)
        records = {row[0]: _record(row) for row in rows}
        damaged = [number for number, record in records.items() if record is None]
        if not damaged:
            return
        kept = self._path.with_name(self._path.name + ".damaged")
        with writing_to(self._path.parent):
            shutil.copy(self._path, kept)  # as private as it is
        whole = [record for record in records.values() if record is not None]
        states = {record.version.state for record in whole}
        with self.transaction():
            for number in damaged:
                log.error(
                    "the record of a version is damaged, and the version is lost",
                    file=str(self._path),
                    policy_version=number,
                    copy=str(kept),
                )
                self.put(_lost(number, self._path))
            candidates = [record for record in whole if record.version.state is VersionState.KEPT]
            if VersionState.SERVING not in states and candidates:
                newest = max(candidates, key=lambda record: record.number)
                log.error("an earlier version serves instead", file=str(self._path), policy_version=newest.number)
                self.put(newest.now(state=VersionState.SERVING))


def _open(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    try:
        db.text_factory = any_text
        db.execute("PRAGMA synchronous = FULL")
        _prepare(db, path)
    except (sqlite3.Error, UnicodeError) as error:
        db.close()
        raise _unusable(path, error) from error
    except BaseException:
        db.close()
        raise
    return db


def _unusable(path: Path, error: object) -> DamagedTable:
    return DamagedTable(f"state_folder: cannot use {path}: {error}. {_ADVICE}")


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Brings the table to this release's schema, and looks at the structure of the file. Raises OSError."""
    [(schema,)] = db.execute("PRAGMA user_version").fetchall()
    if schema > _SCHEMA:
        raise OSError(f"state_folder: {path} has schema {schema}, and this program knows schemas up to {_SCHEMA}")
    if schema == 0:
        db.executescript(f"BEGIN; {_TABLE}; {_ONE_SERVES}; {_OF_A_MODEL}; PRAGMA user_version = {_SCHEMA}; COMMIT;")
    elif schema == 1:
        _add_sums(db)
    if problems := structure_problems(db):
        raise _unusable(path, f"its structure is damaged ({problems[0]})")
    made = sqlite3.connect(":memory:")
    for statement in (_TABLE, _ONE_SERVES, _OF_A_MODEL):
        made.execute(statement)
    damaged = _schema_of(db) != _schema_of(made)
    made.close()
    if damaged:
        raise _unusable(path, "its schema is damaged")


def _schema_of(db: sqlite3.Connection) -> list[list[tuple[Any, ...]]]:
    pragmas = ("table_info(records)", "index_list(records)", "index_info(one_serves)", "index_info(of_a_model)")
    return [db.execute(f"PRAGMA {pragma}").fetchall() for pragma in pragmas]


def _add_sums(db: sqlite3.Connection) -> None:
    """Of a table that an earlier release wrote: what it holds is taken as it is. The new one has another name, because
    such a release would change it without checksums."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        rows = db.execute(f"SELECT {_COLUMNS} FROM versions").fetchall()
        db.execute("DROP TABLE versions")
        for statement in (_TABLE, _ONE_SERVES, _OF_A_MODEL):
            db.execute(statement)
        places = ", ".join("?" * (len(_NAMES) + 1))
        sealed = [(*row, row_sum(row)) for row in rows]
        db.executemany(f"INSERT INTO records ({_COLUMNS}, crc) VALUES ({places})", sealed)
        db.execute(f"PRAGMA user_version = {_SCHEMA}")


def _name(row: Sequence[Any]) -> str:
    return f"the record of version {row[0]}"


def _lost(number: int, path: Path) -> VersionRecord:
    version = PolicyVersion(
        policy_version=number,
        kind=WeightsKind.FULL,
        state=VersionState.REMOVED,
        sha256="",
        fingerprint="",
        created_at=datetime.fromtimestamp(0, UTC),
        problem=_LOST.format(path.name),
        model="",
    )
    return VersionRecord(version, number, "", "")


def _row(record: VersionRecord) -> tuple[Any, ...]:
    version = record.version
    difference = version.canary_difference
    return (
        version.policy_version,
        record.origin,
        record.source,
        record.setup,
        version.kind.value,
        version.state.value,
        version.sha256,
        version.fingerprint,
        version.created_at.astimezone(UTC).isoformat(),
        version.problem,
        None if difference is None else float(difference),
        version.engine_checksum,
        version.model,
        json.dumps([[probe.token_ids, probe.log_probs] for probe in record.canary]),
    )


def _record(row: Sequence[Any]) -> VersionRecord | None:
    """None for a row that is damaged."""
    *values, crc = row
    if not is_sound(values, crc):
        return None
    try:
        return _read(values)
    except (ValueError, TypeError):  # written so by an earlier release, or damaged before it had a checksum
        return None


def _read(values: Sequence[Any]) -> VersionRecord:
    number, origin, source, setup, kind, state, sha256, fingerprint, created, problem, difference, *rest = values
    checksum, model, canary = rest
    version = PolicyVersion(
        policy_version=number,
        kind=WeightsKind(kind),
        state=VersionState(state),
        sha256=sha256,
        fingerprint=fingerprint,
        created_at=datetime.fromisoformat(created),
        problem=problem,
        canary_difference=difference,
        engine_checksum=checksum,
        model=model,
    )
    probes = tuple(CanaryProbe(tuple(ids), tuple(log_probs)) for ids, log_probs in json.loads(canary))
    return VersionRecord(version, origin, source, setup, probes)
