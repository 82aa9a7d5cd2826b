"""Reflections in one SQLite file, written by one process.

One thread owns the connection, so the event loop never waits for the disk. The thread takes all waiting calls, runs
them in one transaction and answers them after the commit. With synchronous=FULL a commit waits for the disk
(milliseconds); a burst of writes waits only once. An acknowledged write survives SIGKILL and a loss of power. NORMAL
would survive only SIGKILL, and the time that it saves does not matter at one write per experience.

After an erasure the file is written anew (VACUUM). SQLite overwrites what is deleted (secure_delete), but a page that
was split may keep a copy of a row that moved to another page.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import sqlalchemy as sa

from mulligan.common.disk import folder_removed, writing_to
from mulligan.common.errors import DomainError, Reason
from mulligan.common.file_lock import lock_file
from mulligan.common.files import make_folder
from mulligan.common.row_sums import RowDamage, any_text, is_damage, structure_problems
from mulligan.memory.store import StoreError, StoreSettings
from mulligan.memory.stores._sql import writes
from mulligan.memory.stores._sql.migrate import migrate
from mulligan.memory.stores._sql.store import SqlStore, plain_errors
from mulligan.memory.stores._sql.sums import tell_damaged, with_damage
from mulligan.memory.stores._sql.tables import metadata
from mulligan.memory.stores._sql.worker import Call, Worker

R = TypeVar("R")

_RESTORE = "Put a copy of the database back."
_ADVICE = "Put a copy of the database back, or erase the entry that is damaged."
_SETTINGS = (
    "journal_mode = WAL",
    "synchronous = FULL",
    "secure_delete = ON",
    "cache_size = -65536",
    "journal_size_limit = 67108864",  # of the log between transactions; a large one would keep its size for ever
)
_LOOKED_AT_BYTES = 2**26  # a larger file takes long; its damage is told when it is read


class Settings(StoreSettings):
    """This store has no settings besides its location."""


async def open(location: str, settings: Settings) -> SqliteStore:
    """Opens the file at `location`, or makes it. Raises StoreError when it cannot be used."""
    return await asyncio.to_thread(SqliteStore, Path(location), asyncio.get_running_loop())


class SqliteStore(SqlStore):
    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop):
        super().__init__()
        self._path = path
        self._damage = RowDamage(path, _ADVICE)
        self._lock = _lock(path)
        try:
            self._connection = _open(path, self._damage)
            self._read_only = _is_read_only(self._connection)
        except BaseException:
            self._lock.close()
            raise
        self._worker = Worker("sqlite", loop, self._run, self._end)

    async def close(self) -> None:
        await self._worker.close()

    async def _read(self, call: Callable[[sa.Connection], R], *, one_state: bool = True) -> R:
        return await self._worker.do(call)

    async def _write(self, call: Callable[[sa.Connection], R]) -> R:
        return await self._worker.do(call)

    async def _clean(self) -> None:
        await self._worker.do(lambda db: _clean(db, self._path), alone=True)

    def _run(self, calls: Sequence[Call], alone: bool) -> list[Any]:
        if not alone:
            return self._transact(calls)
        try:
            with writing_to(self._path.parent), plain_errors():
                return [calls[0](self._connection)]
        except Exception as error:  # noqa: BLE001 - whoever waits must be told
            return [self._named(error)]

    def _named(self, error: Exception) -> Exception:
        if is_damage(error):
            return self._damage.of_file(error)
        if self._read_only and getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY:
            return self._damage.of_file(
                sqlite3.DatabaseError("nothing is written to a file whose structure is damaged")
            )
        return error

    def _transact(self, calls: Sequence[Call]) -> list[Any]:
        """Runs all calls in one transaction. A DomainError is the answer to one call; calls check everything before
        they write. After any other failure nothing is written and each call is run alone, so that calls that only read
        are answered on a full disk. SQLite itself would go on writing to a database that was deleted."""
        answers: list[Any] = []
        sqlite = _sqlite(self._connection)
        changes = sqlite.total_changes
        try:
            with writing_to(self._path.parent), plain_errors(), self._connection.begin():
                for call in calls:
                    try:
                        answers.append(call(self._connection))
                    except DomainError as error:
                        answers.append(error)
                if sqlite.total_changes != changes and not self._path.exists():
                    raise folder_removed(self._path.parent)
        except Exception as error:  # noqa: BLE001 - whoever waits must be told
            self._indexes.forget()
            if len(calls) == 1:
                return [self._named(error)]
            return [answer for call in calls for answer in self._transact([call])]
        return answers

    def _end(self) -> None:
        self._connection.close()
        self._lock.close()


def _lock(path: Path) -> IO[bytes]:
    """Locks a file beside the database, since SQLite has locks of its own on the database."""
    lock_path = path.with_name(path.name + ".lock")
    try:
        make_folder(path.parent)
        return lock_file(lock_path)
    except BlockingIOError:
        raise StoreError(f"database: {path} is in use by another process; a database has one server") from None
    except OSError as error:
        raise StoreError(f"database: cannot use {path}: {error}") from error


def _open(path: Path, damage: RowDamage) -> sa.Connection:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        poolclass=sa.NullPool,
        hide_parameters=True,
        execution_options=with_damage(damage),
        connect_args={"check_same_thread": False, "isolation_level": None},  # SQLAlchemy begins transactions, below
    )
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    try:
        with plain_errors():
            connection = engine.connect()
    except sqlite3.Error as error:
        raise StoreError(f"database: cannot open {path}: {error}") from error
    try:
        with plain_errors():
            sqlite = _sqlite(connection)
            sqlite.text_factory = any_text
            for setting in _SETTINGS:
                sqlite.execute(f"PRAGMA {setting}")
            with connection.begin():
                migrate(connection, str(path))
            _check_schema(connection, path)
            if _look(connection, path, damage):
                _clean(connection, path)
    except (sqlite3.Error, UnicodeError) as error:
        connection.close()
        advice = f". {_RESTORE}" if is_damage(error) or isinstance(error, UnicodeError) else ""
        raise StoreError(f"database: cannot use {path}: {error}{advice}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _check_schema(connection: sa.Connection, path: Path) -> None:
    """Raises StoreError where a damaged schema names other columns or types than this release makes."""
    for table in metadata.sorted_tables:
        rows = _sqlite(connection).execute(f"PRAGMA table_info({table.name})")
        found = {name: kind for _, name, kind, *_ in rows}
        made = {column.name: column.type.compile(connection.dialect) for column in table.columns}
        if found != made:
            wrong = sorted(name for name, _ in found.items() ^ made.items())[0]
            raise StoreError(f"database: the schema of {path} is damaged: {table.name}.{wrong}. {_RESTORE}")


def _look(connection: sa.Connection, path: Path, damage: RowDamage) -> bool:
    """Tells what is damaged. Returns whether the structure of the file is whole, as far as it was looked at. Nothing is
    written to one that is not: what is whole of it stays readable."""
    sqlite = _sqlite(connection)
    if path.stat().st_size > _LOOKED_AT_BYTES:
        return True
    if problems := structure_problems(sqlite):
        damage.tell("the file", f"its structure is damaged, so nothing is written to it: {'; '.join(problems)}")
        sqlite.execute("PRAGMA query_only = ON")
        return False
    with connection.begin():
        tell_damaged(connection)
    return True


def _is_read_only(connection: sa.Connection) -> bool:
    return bool(_sqlite(connection).execute("PRAGMA query_only").fetchone()[0])


def _sqlite(connection: sa.Connection) -> sqlite3.Connection:
    own = connection.connection.driver_connection
    assert isinstance(own, sqlite3.Connection)
    return own


def _clean(connection: sa.Connection, path: Path) -> None:
    """Removes erased bytes from the database and its log. What a crash interrupts is done at the next start."""
    with connection.begin():
        erased = writes.all_uncleaned(connection)
    if not erased:
        return
    if not path.exists():
        raise folder_removed(path.parent)
    sqlite = _sqlite(connection)
    sqlite.execute("VACUUM")
    busy, _, _ = sqlite.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        message = f"another program reads {path}, so its files still have erased bytes: end it, and erase again"
        raise DomainError(Reason.SERVICE_UNAVAILABLE, message)
    with connection.begin():
        writes.cleaned(connection, erased)
