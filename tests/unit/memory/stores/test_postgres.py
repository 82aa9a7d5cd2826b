"""The store in PostgreSQL: what every store passes, several servers on one database, and its refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from mulligan.common.errors import DomainError, Reason
from mulligan.memory.store import Order, Rewriting, Store, StoreError
from mulligan.memory.stores import postgres
from mulligan.memory.stores._sql import tables
from mulligan.testing.postgres import PostgresServer
from tests.support.postgres import postgres_for_tests
from tests.support.random_calls import random_calls
from tests.support.stores import CountingEmbedder, Open, StoreChecks, new, selection

SETTINGS = postgres.Settings(connections=3)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[PostgresServer]:
    with postgres_for_tests() as started:
        Databases.server = started
        yield started


class Databases:
    """A database for each folder of a test."""

    server: PostgresServer

    @classmethod
    def open_in(cls, folder: Path) -> Awaitable[Store]:
        name = folder / "database"
        if not name.exists():
            name.write_text(cls.server.new_database())
        return postgres.open(cls.server.location(name.read_text()), SETTINGS)


class TestPostgres(StoreChecks):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Open:
        return lambda: Databases.open_in(tmp_path)


TestRandomCalls = random_calls(Databases.open_in, 6)


async def test_servers_share_a_database(server: PostgresServer) -> None:
    """Versions have no gaps, no update is lost, and each server's searches see what the others wrote."""
    location = server.location(server.new_database())
    first, second = await asyncio.gather(*(postgres.open(location, SETTINGS) for _ in range(2)))
    for store in (first, second):
        await store.use_embedder(CountingEmbedder("letters"))
    calls = [store.add(new(f"{n}", f"word{n}")) for n in range(60) for store in (first, second)]
    added = await asyncio.gather(*calls)
    assert added[::2] == added[1::2] and sorted(one.version for one in added[::2]) == list(range(1, 61))
    for version, store, other in ((61, first, second), (62, second, first)):
        assert len((await other.find_words(selection(), "word7", 9)).reflections) == version - 60
        await store.add(new(f"later {version}", "word7"))
        assert (await other.snapshot("scope")).version == version
        assert len((await other.find_words(selection(), "word7", 9)).reflections) == version - 59
    await first.erase(added[14].reflection_id)
    assert len((await second.find_words(selection(), "word7", 9)).reflections) == 2

    async def append(store: Store, word: str) -> None:
        while True:
            seen = await store.get(added[0].reflection_id)
            rewriting = Rewriting(seen.reflection_id, word, seen.revision, text=f"{seen.text} {word}")
            try:
                await store.revise(rewriting)
            except DomainError as error:
                if error.reason is not Reason.REVISION_CONFLICT:
                    raise
            else:
                return

    await asyncio.gather(
        *(append(store, f"{name}{n}") for n in range(8) for name, store in (("a", first), ("b", second)))
    )
    text = (await first.get(added[0].reflection_id)).text
    assert sorted(text.split()) == sorted(["word0", *(f"{name}{n}" for n in range(8) for name in "ab")])
    changes = (await second.changes("scope", 0, 1000)).changes
    assert [change.version for change in changes] == list(range(1, 80))
    await first.close()
    await second.close()


async def test_migrations_make_the_tables(server: PostgresServer) -> None:
    database = server.new_database()
    await (await postgres.open(server.location(database), SETTINGS)).close()
    engine = sa.create_engine(server.location(database).replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": False})
        assert compare_metadata(context, tables.metadata) == []
    engine.dispose()


async def test_erased_bytes_are_in_no_table_file(server: PostgresServer) -> None:
    database = server.new_database()
    store = await postgres.open(server.location(database), SETTINGS)
    texts = {name: f"{name}needle " * 40 for name in ("first", "second", "kept")}
    added = [await store.add(new(name, text, key=f"{name}key", tags=(f"{name}tag",))) for name, text in texts.items()]
    await store.revise(Rewriting(added[0].reflection_id, "r", 1, text="firstneedle again"))
    server.run("ANALYZE", database)
    server.run("CHECKPOINT", database)
    assert all(word in _table_files(server) for word in (b"firstneedle", b"secondkey", b"secondtag"))
    await asyncio.gather(*(store.erase(one.reflection_id) for one in added[:2]))
    server.run("CHECKPOINT", database)
    files = _table_files(server)
    for name in (b"first", b"second"):
        assert not any(name + part in files for part in (b"needle", b"key", b"tag"))
    assert b"keptneedle" in files and b"keptkey" in files
    await store.close()


def _table_files(server: PostgresServer) -> bytes:
    return b"".join(path.read_bytes() for path in (server.folder / "base").rglob("*") if path.is_file())


async def test_a_newer_schema_and_another_programs_tables_are_left_alone(server: PostgresServer) -> None:
    database = server.new_database()
    await (await postgres.open(server.location(database), SETTINGS)).close()
    server.run("UPDATE alembic_version SET version_num = '99'", database)
    with pytest.raises(StoreError, match=f"{database} has schema 99, and this program knows schemas up to 5"):
        await postgres.open(server.location(database), SETTINGS)
    database = server.new_database()
    server.run("CREATE TABLE photos (name TEXT)", database)
    with pytest.raises(StoreError, match=f"{database} belongs to another program"):
        await postgres.open(server.location(database), SETTINGS)


async def test_who_may_not_create_pgvector_is_told_so(server: PostgresServer) -> None:
    database = server.new_database()
    server.run(f"CREATE ROLE plain_{database} LOGIN")
    server.run(f"GRANT CREATE ON SCHEMA public TO plain_{database}", database)
    with pytest.raises(StoreError, match="an administrator has to run CREATE EXTENSION vector there"):
        await postgres.open(server.location(database, f"plain_{database}"), SETTINGS)


async def test_a_server_without_pgvector_is_named(server: PostgresServer) -> None:
    database = server.new_database()
    server.run(f"ALTER DATABASE {database} SET extension_control_path = '/nowhere'")
    with pytest.raises(StoreError, match=f"the server of .*{database} has no pgvector; install it there"):
        await postgres.open(server.location(database), SETTINGS)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("somewhere", "expected postgres:postgresql://USER@HOST:PORT/DATABASE"),
        ("mysql://me:hunter2@host/db", "expected postgres:postgresql://USER@HOST:PORT/DATABASE"),
        ("postgresql://me:hunter2@host:port/db", "expected postgres:postgresql://USER@HOST:PORT/DATABASE"),
        ("postgresql://me:hunter2@127.0.0.1:1/db", "cannot use postgresql://me:***@127.0.0.1:1/db: "),
        ("postgresql://me@127.0.0.1:1/db?password=hunter2", "cannot use postgresql://me@127.0.0.1:1/db: "),
    ],
)
async def test_no_message_has_a_password(location: str, said: str) -> None:
    with pytest.raises(StoreError) as caught:
        await postgres.open(location, SETTINGS)
    assert said in str(caught.value) and "hunter2" not in str(caught.value)


async def test_a_database_that_went_away_is_told_and_comes_back(server: PostgresServer) -> None:
    database = server.new_database()
    store = await postgres.open(server.location(database), SETTINGS)
    await store.add(new("a"))
    server.run(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
    server.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")
    for call in (store.add(new("b")), store.find(selection(), Order.NEWEST, 1)):
        with pytest.raises(DomainError) as caught:
            await call
        assert caught.value.reason is Reason.SERVICE_UNAVAILABLE and database in str(caught.value)
    server.run(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
    assert (await store.add(new("b"))).version == 2
    await store.close()


async def test_a_connection_that_was_idle_is_asked_first(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_IDLE_SECONDS", 0.0)
    database = server.new_database()
    store = await postgres.open(server.location(database), SETTINGS)
    for version in (1, 2):
        assert (await store.add(new(f"r{version}", f"text {version}"))).version == version
        assert len((await store.find(selection(), Order.NEWEST, 5)).reflections) == version
        server.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")
    await store.close()
