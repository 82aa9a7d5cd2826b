"""Reflections in one SQLite file, written by one process.

One thread owns the connection, so the event loop never waits for the disk. The thread takes all waiting calls, runs
them in one transaction and answers them after the commit. With synchronous=FULL a commit waits for the disk
(milliseconds); a burst of writes waits only once. An acknowledged write survives SIGKILL and a loss of power. NORMAL
would survive only SIGKILL, and the time that it saves does not matter at one write per experience.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import astuple
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, TypeVar

from mulligan.common.disk import folder_removed, writing_to
from mulligan.common.errors import DomainError, Reason
from mulligan.common.file_lock import lock_file
from mulligan.common.reflections import Provenance, RetrievalStrategy, StoredReflection
from mulligan.memory.store import Added, Found, Page, Snapshot, StoreError, StoreSettings, reflection_id

_MAX_TRANSACTION = 256
_CREATE = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO schema_version VALUES (0);
CREATE TABLE scopes (scope TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE reflections (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    reflection_id TEXT NOT NULL UNIQUE,
    scope TEXT NOT NULL,
    text TEXT NOT NULL,
    run_id TEXT NOT NULL,
    experience_id TEXT NOT NULL,
    environment TEXT NOT NULL,
    task_id TEXT NOT NULL,
    policy_version INTEGER NOT NULL,
    reward_before REAL NOT NULL,
    reward_after REAL NOT NULL,
    success INTEGER NOT NULL,
    version INTEGER NOT NULL,
    created_microseconds INTEGER NOT NULL,
    deleted_version INTEGER
);
CREATE INDEX retrieval ON reflections (scope, environment, success, version);
"""
_MIGRATIONS = (_CREATE,)  # the script at index n brings a database of schema n to n + 1
_COLUMNS = (
    "position, reflection_id, scope, text, run_id, experience_id, environment, task_id, policy_version, "
    "reward_before, reward_after, success, version, created_microseconds, deleted_version"
)
_ORDERS = {
    RetrievalStrategy.LATEST_SUCCESS: "version DESC",
    RetrievalStrategy.TOP_GAIN: "reward_after - reward_before DESC, version DESC",
}
R = TypeVar("R")
_Call = tuple[Callable[[sqlite3.Connection], Any], "asyncio.Future[Any]"]


class Settings(StoreSettings):
    """This store has no settings besides its location."""


async def open(location: str, settings: Settings) -> SqliteStore:
    """Opens the file at `location`, or makes it. Raises StoreError when it cannot be used."""
    return await asyncio.to_thread(SqliteStore, Path(location), asyncio.get_running_loop())


class SqliteStore:
    """A `Store`. Methods run on the event loop; the functions below them, on the connection's thread."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._path = path
        self._lock = _lock(path)
        try:
            self._connection = _open(path)
        except BaseException:
            self._lock.close()
            raise
        self._thread = threading.Thread(target=self._run, name="sqlite", daemon=True)
        self._thread.start()

    async def add(self, request_id: str, scope: str, text: str, provenance: Provenance) -> Added:
        return await self._do(lambda db: _add(db, request_id, scope, text, provenance))

    async def query(
        self, scope: str, environment: str, strategy: RetrievalStrategy, limit: int, as_of_version: int | None
    ) -> Found:
        return await self._do(lambda db: _query(db, scope, environment, strategy, limit, as_of_version))

    async def get(self, reflection_id: str) -> StoredReflection:
        return await self._do(lambda db: _reflection(_row(db, reflection_id)))

    async def list(self, scope: str, position: int, limit: int, include_deleted: bool) -> Page:
        return await self._do(lambda db: _list(db, scope, position, limit, include_deleted))

    async def delete(self, reflection_id: str) -> int:
        return await self._do(lambda db: _delete(db, reflection_id))

    async def snapshot(self, scope: str) -> Snapshot:
        return await self._do(lambda db: _snapshot(db, scope))

    async def close(self) -> None:
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _do(self, call: Callable[[sqlite3.Connection], R]) -> R:
        future: asyncio.Future[R] = self._loop.create_future()
        self._calls.put((call, future))
        return await future

    def _run(self) -> None:
        closing = False
        while not closing:
            waiting = [self._calls.get()]
            try:
                while len(waiting) < _MAX_TRANSACTION:
                    waiting.append(self._calls.get_nowait())
            except Empty:
                pass
            closing = None in waiting
            calls = [call for call in waiting if call is not None]
            answers = _transact(self._connection, self._path, [call for call, _ in calls])
            self._loop.call_soon_threadsafe(_deliver, [future for _, future in calls], answers)
        self._connection.close()
        self._lock.close()


def _deliver(futures: list[asyncio.Future[Any]], answers: list[Any]) -> None:
    for future, answer in zip(futures, answers, strict=True):
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def _transact(db: sqlite3.Connection, path: Path, calls: list[Callable[[sqlite3.Connection], Any]]) -> list[Any]:
    """Runs all calls in one transaction. A DomainError is the answer to one call; calls check everything before they
    write. After any other failure nothing is written and each call is run alone, so that calls that only read are
    answered on a full disk. SQLite itself would go on writing to a database that was deleted."""
    answers: list[Any] = []
    changes = db.total_changes
    try:
        with writing_to(path.parent):
            db.execute("BEGIN")
            for call in calls:
                try:
                    answers.append(call(db))
                except DomainError as error:
                    answers.append(error)
            if db.total_changes != changes and not path.exists():
                raise folder_removed(path.parent)
            db.execute("COMMIT")
    except Exception as error:  # noqa: BLE001 - whoever waits must be told
        if db.in_transaction:
            db.execute("ROLLBACK")
        if len(calls) == 1:
            return [error]
        return [answer for call in calls for answer in _transact(db, path, [call])]
    return answers


def _lock(path: Path) -> IO[bytes]:
    """Locks a file beside the database, since SQLite has locks of its own on the database."""
    lock_path = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return lock_file(lock_path)
    except BlockingIOError:
        raise StoreError(f"database: {path} is in use by another process; a database has one server") from None
    except OSError as error:
        raise StoreError(f"database: cannot use {path}: {error}") from error


def _open(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise StoreError(f"database: cannot open {path}: {error}") from error
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        _migrate(db, path)
    except sqlite3.Error as error:
        db.close()
        raise StoreError(f"database: cannot use {path}: {error}") from error
    except StoreError:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and "schema_version" not in tables:
        raise StoreError(f"database: {path} belongs to another program")
    version = db.execute("SELECT version FROM schema_version").fetchone()[0] if tables else 0
    if version > len(_MIGRATIONS):
        raise StoreError(
            f"database: {path} has schema {version}, and this program knows schemas up to {len(_MIGRATIONS)}: "
            "use a newer release, or another file"
        )
    for number in range(version, len(_MIGRATIONS)):
        db.executescript(f"BEGIN; {_MIGRATIONS[number]} UPDATE schema_version SET version = {number + 1}; COMMIT;")


def _version(db: sqlite3.Connection, scope: str) -> int:
    row = db.execute("SELECT version FROM scopes WHERE scope = ?", (scope,)).fetchone()
    return row[0] if row else 0


def _next_version(db: sqlite3.Connection, scope: str) -> int:
    made = "INSERT INTO scopes VALUES (?, 1) ON CONFLICT (scope) DO UPDATE SET version = version + 1"
    db.execute(made, (scope,))
    return _version(db, scope)


def _add(db: sqlite3.Connection, request_id: str, scope: str, text: str, provenance: Provenance) -> Added:
    new_id = reflection_id(scope, request_id)
    row = db.execute(f"SELECT {_COLUMNS} FROM reflections WHERE reflection_id = ?", (new_id,)).fetchone()
    if row is not None:
        stored = _reflection(row)
        if (stored.text, stored.provenance) != (text, provenance):
            message = f"request {request_id!r} stored another reflection in scope {scope!r}"
            raise DomainError(Reason.REQUEST_CONFLICT, message)
        return Added(new_id, stored.version)
    version = _next_version(db, scope)
    now = int(datetime.now(UTC).timestamp() * 1e6)
    values = (new_id, scope, text, *astuple(provenance), version, now)
    marks = ", ".join("?" * len(values))
    db.execute(f"INSERT INTO reflections ({_COLUMNS}) VALUES (NULL, {marks}, NULL)", values)
    return Added(new_id, version)


def _query(
    db: sqlite3.Connection,
    scope: str,
    environment: str,
    strategy: RetrievalStrategy,
    limit: int,
    as_of_version: int | None,
) -> Found:
    newest = _version(db, scope)
    version = newest if as_of_version is None else as_of_version
    if version > newest:
        message = f"scope {scope!r} is at version {newest}, not yet at {version}"
        raise DomainError(Reason.UNKNOWN_VERSION, message, version=newest)
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM reflections WHERE scope = ? AND environment = ? AND success AND version <= ? "
        f"AND (deleted_version IS NULL OR deleted_version > ?) ORDER BY {_ORDERS[strategy]} LIMIT ?",
        (scope, environment, version, version, limit),
    )
    return Found(tuple(map(_reflection, rows)), version)


def _list(db: sqlite3.Connection, scope: str, position: int, limit: int, include_deleted: bool) -> Page:
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM reflections WHERE position > ? AND (? = '' OR scope = ?) "
        "AND (? OR deleted_version IS NULL) ORDER BY position LIMIT ?",
        (position, scope, scope, include_deleted, limit + 1),
    ).fetchall()
    more = len(rows) > limit
    return Page(tuple(map(_reflection, rows[:limit])), rows[limit - 1][0] if more else None)


def _delete(db: sqlite3.Connection, reflection_id: str) -> int:
    stored = _reflection(_row(db, reflection_id))
    if stored.deleted_version is not None:
        return stored.deleted_version
    version = _next_version(db, stored.scope)
    db.execute("UPDATE reflections SET deleted_version = ? WHERE reflection_id = ?", (version, reflection_id))
    return version


def _snapshot(db: sqlite3.Connection, scope: str) -> Snapshot:
    count = "SELECT count(*) FROM reflections WHERE scope = ? AND deleted_version IS NULL"
    return Snapshot(_version(db, scope), db.execute(count, (scope,)).fetchone()[0])


def _row(db: sqlite3.Connection, reflection_id: str) -> tuple[Any, ...]:
    query = f"SELECT {_COLUMNS} FROM reflections WHERE reflection_id = ?"
    row: tuple[Any, ...] | None = db.execute(query, (reflection_id,)).fetchone()
    if row is None:
        raise DomainError(Reason.UNKNOWN_REFLECTION, f"no reflection {reflection_id!r} here")
    return row


def _reflection(row: tuple[Any, ...]) -> StoredReflection:
    _, identity, scope, text, *origin, success, version, created_microseconds, deleted_version = row
    provenance = Provenance(*[*origin, bool(success)])
    created_at = datetime.fromtimestamp(created_microseconds / 1e6, UTC)
    return StoredReflection(identity, scope, text, provenance, version, created_at, deleted_version)
