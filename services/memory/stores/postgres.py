"""Reflections in a PostgreSQL database (15 or newer, with pgvector), which several servers may share.

Writes of all servers take turns: a lock of the database is held from the first statement of a write to its commit. So
versions have no gaps, and pages follow the order of commits. A turn writes all that waits at its server. Reads run
beside them, in a transaction that sees one state where that matters. All of this runs on threads of its own.

Words and embeddings are searched by indexes in memory, as in other stores: PostgreSQL's ranking has no BM25, and an
exact search by pgvector takes about ten times as long. Embeddings have pgvector's type, for other programs.

An erasure rewrites the tables that had the entry (VACUUM FULL). The server removes the old files at its next
checkpoint. Its write-ahead log, its replicas and its backups have the bytes until they are recycled.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from pydantic import Field

from mulligan.common.errors import DomainError, Reason
from mulligan.common.extras import MissingExtra
from mulligan.common.row_sums import RowDamage
from mulligan.memory.store import StoreError, StoreSettings
from mulligan.memory.stores._sql import writes
from mulligan.memory.stores._sql.libpq import protected
from mulligan.memory.stores._sql.migrate import migrate
from mulligan.memory.stores._sql.store import SqlStore, plain_errors
from mulligan.memory.stores._sql.sums import with_damage
from mulligan.memory.stores._sql.worker import Call, Worker

if TYPE_CHECKING:
    import psycopg

R = TypeVar("R")

_ADVICE = "Restore the row from a backup, or erase the entry that is damaged."
_OLDEST = 15
_WRITING = 7_305_104_236_301  # the number of the lock of writes, among all of the database
_OLD_READS_SECONDS = 30.0  # that an erasure waits for transactions which may still see the erased rows
_PAUSE_SECONDS = 0.02
_IDLE_SECONDS = 1.0


class Settings(StoreSettings):
    """Of PostgreSQL."""

    connections: int = Field(8, ge=2, le=1000, description="To the database, at most; one is for writes.")
    insecure: bool = Field(
        False,
        description="The password may go to another machine without TLS, over a network in which you trust everybody.",
    )


async def open(location: str, settings: Settings) -> PostgresStore:
    """Connects to `postgresql://USER@HOST:PORT/DATABASE`. What is missing there, such as a password, comes from libpq's
    environment variables and files. With a password, servers on other machines are reached by TLS, and have to show
    that they are the one. Raises StoreError when the database cannot be used, and MissingExtra."""
    try:
        import pgvector.sqlalchemy  # noqa: F401
        import psycopg  # noqa: F401
    except ImportError as error:
        raise MissingExtra("postgres", error) from error
    return await asyncio.to_thread(
        PostgresStore, protected(_url(location), insecure=settings.insecure), settings, asyncio.get_running_loop()
    )


class PostgresStore(SqlStore):
    def __init__(self, url: sa.URL, settings: Settings, loop: asyncio.AbstractEventLoop):
        super().__init__()
        self._loop = loop
        self._name = _name(url)
        self._engine = sa.create_engine(
            url,
            pool_size=settings.connections,
            max_overflow=0,
            hide_parameters=True,
            execution_options=with_damage(RowDamage(self._name, _ADVICE)),
        )
        _ask_idle_connections(self._engine)
        self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        try:
            _prepare(self._engine, self._name)
        except BaseException:
            self._engine.dispose()
            raise
        self._readers = ThreadPoolExecutor(settings.connections - 1, "postgres-read")
        self._worker = Worker("postgres", loop, self._run, self._end)

    async def close(self) -> None:
        await self._worker.close()

    async def _read(self, call: Callable[[sa.Connection], R], *, one_state: bool = True) -> R:
        engine = self._reading if one_state else self._autocommit
        return await self._loop.run_in_executor(self._readers, self._read_now, engine, call)

    def _read_now(self, engine: sa.Engine, call: Callable[[sa.Connection], R]) -> R:
        with _answering(self._name), engine.begin() as connection:  # with autocommit, that sends nothing
            return call(connection)

    async def _write(self, call: Callable[[sa.Connection], R]) -> R:
        return await self._worker.do(call)

    async def _clean(self) -> None:
        await self._worker.do(_clean, alone=True)

    def _run(self, calls: Sequence[Call], alone: bool) -> list[Any]:
        if not alone:
            return self._transact(calls)
        try:
            with _answering(self._name), self._autocommit.connect() as connection:
                return [calls[0](connection)]
        except Exception as error:  # noqa: BLE001 - whoever waits must be told
            return [error]

    def _transact(self, calls: Sequence[Call]) -> list[Any]:
        """Runs all calls in one transaction, in the server's turn. A DomainError is the answer to one call; calls check
        everything before they write. After any other failure nothing is written and each call is run alone."""
        answers: list[Any] = []
        try:
            with _answering(self._name), self._engine.begin() as connection:
                _take_turn(connection)
                for call in calls:
                    try:
                        answers.append(call(connection))
                    except DomainError as error:
                        answers.append(error)
        except Exception as error:  # noqa: BLE001 - whoever waits must be told
            if len(calls) == 1:
                return [error]
            return [answer for call in calls for answer in self._transact([call])]
        return answers

    def _end(self) -> None:
        self._readers.shutdown()
        self._engine.dispose()


def _ask_idle_connections(engine: sa.Engine) -> None:
    """A connection that was idle for some time is asked whether it still works before it is used. (SQLAlchemy's
    `pool_pre_ping` asks each time, which takes as long as some queries do.)"""
    import psycopg

    def returned(_: Any, record: sa.pool.ConnectionPoolEntry) -> None:
        record.info["returned"] = time.monotonic()

    def taken(connection: sa.engine.interfaces.DBAPIConnection, record: sa.pool.ConnectionPoolEntry, _: Any) -> None:
        if time.monotonic() - record.info.get("returned", math.inf) < _IDLE_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except psycopg.Error as error:
            raise sa.exc.DisconnectionError from error  # the pool makes another one

    sa.event.listen(engine, "checkin", returned)
    sa.event.listen(engine, "checkout", taken)


def _url(location: str) -> sa.URL:
    """Raises StoreError, which does not quote the location: it may have a password."""
    expected = StoreError(
        "database: expected postgres:postgresql://USER@HOST:PORT/DATABASE, or for a Unix socket "
        "postgres:postgresql://USER@/DATABASE?host=FOLDER"
    )
    try:
        url = sa.make_url(location)
    except (sa.exc.ArgumentError, ValueError):
        raise expected from None
    if url.drivername not in ("postgresql", "postgres") or not url.database:
        raise expected
    return url.set(drivername="postgresql+psycopg")


def _name(url: sa.URL) -> str:
    """The database in messages, with stars for a password; a query may have one, too."""
    return url.set(drivername="postgresql", query={}).render_as_string()


def _take_turn(connection: sa.Connection) -> None:
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITING)))


def _prepare(engine: sa.Engine, name: str) -> None:
    """Raises StoreError."""
    import psycopg

    try:
        with plain_errors(), engine.begin() as connection:
            number = int(connection.execute(sa.text("SHOW server_version_num")).scalar_one())
            if number < _OLDEST * 10_000:
                raise StoreError(f"database: {name} is PostgreSQL {number // 10_000}, and {_OLDEST} or newer is needed")
            _take_turn(connection)
            _extend(connection, name)
            migrate(connection, name)
        with plain_errors(), engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            _clean(connection)
    except psycopg.Error as error:
        raise StoreError(f"database: cannot use {name}: {_said(error)}") from None


def _extend(connection: sa.Connection, name: str) -> None:
    """Has pgvector. Raises StoreError where it is not installed, or may not be created."""
    import psycopg

    if connection.execute(sa.text("SELECT 1 FROM pg_extension WHERE extname = 'vector'")).scalar():
        return
    if not connection.execute(sa.text("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'")).scalar():
        raise StoreError(
            f"database: the server of {name} has no pgvector; install it there (https://github.com/pgvector/pgvector)"
        )
    try:
        with plain_errors():
            connection.execute(sa.text("CREATE EXTENSION vector"))
    except psycopg.errors.InsufficientPrivilege:
        message = f"database: {name} has no pgvector yet: an administrator has to run CREATE EXTENSION vector there"
        raise StoreError(message) from None


def _clean(connection: sa.Connection) -> None:
    """Rewrites the tables that had erased bytes. The connection commits each statement by itself."""
    erased = writes.all_uncleaned(connection)
    if not erased:
        return
    now = connection.execute(sa.select(sa.func.pg_current_xact_id())).scalar_one()
    deadline = time.monotonic() + _OLD_READS_SECONDS
    oldest = sa.text("SELECT pg_snapshot_xmin(pg_current_snapshot()) >= CAST(CAST(:before AS TEXT) AS xid8)")
    while not connection.execute(oldest, {"before": str(now)}).scalar_one():
        if time.monotonic() > deadline:
            message = "a transaction has been open since before the erasure, so its bytes are still there: erase again"
            raise DomainError(Reason.SERVICE_UNAVAILABLE, message)
        time.sleep(_PAUSE_SECONDS)
    for table in ("texts", "standings", "answered"):
        connection.execute(sa.text(f"VACUUM (FULL) {table}"))
    writes.cleaned(connection, erased)


@contextmanager
def _answering(name: str) -> Iterator[None]:
    """Tells a full disk and a database that is gone as the services do. Other errors are psycopg's."""
    import psycopg

    try:
        with plain_errors():
            yield
    except psycopg.errors.DiskFull as error:
        message = f"the disk of {name} is full: {_said(error)}"
        raise DomainError(Reason.DISK_FULL, message, folder=name, free_bytes=0, needed_bytes=0) from None
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise DomainError(Reason.SERVICE_UNAVAILABLE, f"{name} does not answer: {_said(error)}") from None


def _said(error: psycopg.Error) -> str:
    """The first line. Those after it may quote values."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
