"""The store in a SQLite file: what every store passes, its files, its migrations, and its failures."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import ReflectionStatus, UseOutcome
from mulligan.memory.dense import DenseIndex
from mulligan.memory.embedders import given
from mulligan.memory.store import Added, Found, NewReflection, Order, Rewriting, Store, StoreError, reflection_id
from mulligan.memory.stores import sqlite
from mulligan.memory.stores._sql import queries, ranked, tables
from mulligan.memory.words import WordIndex
from tests.support.paths import ROOT
from tests.support.random_calls import random_calls
from tests.support.stores import ORIGIN, Open, StoreChecks, new, selection, use

OLD = ROOT / "tests/data/memory_schema_1.sql"


def open_in(folder: Path) -> Awaitable[sqlite.SqliteStore]:
    return sqlite.open(str(folder / "memory.db"), sqlite.Settings())


class TestSqlite(StoreChecks):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Open:
        return lambda: open_in(tmp_path)


TestRandomCalls = random_calls(open_in)


async def test_a_second_server_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = await open_in(tmp_path)
    with pytest.raises(StoreError, match=r"memory\.db is in use by another process"):
        await open_in(tmp_path)
    await first.close()
    await (await open_in(tmp_path)).close()


async def test_a_database_of_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    await (await open_in(tmp_path)).close()
    with sqlite3.connect(tmp_path / "memory.db") as db:
        db.execute("UPDATE alembic_version SET version_num = '99'")
    db.close()
    with pytest.raises(StoreError, match=r"memory\.db has schema 99, and this program knows schemas up to 5"):
        await open_in(tmp_path)


def old_database(path: Path) -> None:
    """As the first release wrote it."""
    db = sqlite3.connect(path)
    db.executescript(OLD.read_text())
    db.close()


async def test_a_database_of_the_first_release_is_taken_over_as_a_whole(tmp_path: Path) -> None:
    old_database(tmp_path / "memory.db")
    db = sqlite3.connect(tmp_path / "memory.db")
    rows = db.execute("SELECT * FROM reflections ORDER BY position").fetchall()
    versions = dict(db.execute("SELECT scope, version FROM scopes").fetchall())
    db.close()
    assert len(rows) > 3 and any(row[-1] is not None for row in rows), "some are deleted"
    for _ in range(2):
        store = await open_in(tmp_path)
        listed = (await store.list("", 0, 100, True)).reflections
        for one, row in zip(listed, rows, strict=True):
            origin = one.provenance
            assert (one.reflection_id, one.scope, one.text) == row[1:4]
            assert tuple(getattr(origin, name) for name in origin.__slots__) == row[4:12]
            assert (one.version, int(one.created_at.timestamp() * 1e6), one.deleted_version) == row[12:]
            assert (one.revision, one.status, one.uplift) == (1, ReflectionStatus.CANDIDATE, None)
        for scope, version in versions.items():
            kept = [row for row in rows if row[2] == scope and row[-1] is None]
            assert (await store.snapshot(scope)).version == version
            assert (await store.snapshot(scope)).reflection_count == len(kept)
            await _reads_as_before(store, scope, version, rows)
        first = rows[0]
        assert reflection_id(first[2], "request-0") == first[1]
        again = replace(new("request-0", first[3], first[2]), provenance=listed[0].provenance)
        assert await store.add(again) == Added(first[1], first[12]), "it knows the request"
        await store.close()
    store = await open_in(tmp_path)
    kept = next(row for row in rows if row[-1] is None)
    origin = replace(ORIGIN, environment=kept[6])
    same = replace(new("of today", kept[3], kept[2]), provenance=origin, unless_known=True)
    assert await store.add(same) == Added(kept[1], kept[12]), "its text is known"
    await store.revise(Rewriting(rows[0][1], "r", 1, text="a new text"))
    assert (await store.find_words(selection(scope=rows[0][2]), "new text", 9)).reflections[0].text == "a new text"
    await store.close()


async def _reads_as_before(store: Store, scope: str, newest: int, rows: list[Any]) -> None:
    for version in range(newest + 1):
        there = [row for row in rows if row[2] == scope and row[12] <= version and (row[14] or newest + 1) > version]
        successful = [row[1] for row in there if row[6] == ORIGIN.environment and row[11]]
        found = await store.find(selection(version, scope, successes_only=True), Order.NEWEST, 100)
        assert [one.reflection_id for one in found.reflections] == successful[::-1]


async def test_migrations_make_the_tables(tmp_path: Path) -> None:
    await (await open_in(tmp_path / "new")).close()
    (tmp_path / "old").mkdir()
    old_database(tmp_path / "old/memory.db")
    await (await open_in(tmp_path / "old")).close()
    for folder in ("new", "old"):
        engine = sa.create_engine(f"sqlite:///{tmp_path / folder}/memory.db")
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": False})
            assert compare_metadata(context, tables.metadata) == []
            names = set(sa.inspect(connection).get_table_names())
            assert names == {"alembic_version", *tables.metadata.tables}
        engine.dispose()


async def test_files_that_are_no_memory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("dear diary " * 100)
    with pytest.raises(StoreError, match=r"text\.db: file is not a database"):
        await sqlite.open(str(tmp_path / "text.db"), sqlite.Settings())
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE photos (name TEXT)")
    db.close()
    with pytest.raises(StoreError, match=r"other\.db belongs to another program"):
        await sqlite.open(str(tmp_path / "other.db"), sqlite.Settings())
    with pytest.raises(StoreError, match="cannot use"):
        await sqlite.open("/dev/null/memory.db", sqlite.Settings())


async def test_erased_bytes_are_in_no_file(tmp_path: Path) -> None:
    """Among many entries, so that pages are split; also of older revisions, and after further erasures."""
    store = await open_in(tmp_path)
    await store.use_embedder(None)
    wanted: list[NewReflection] = []
    erased, needles, revisions = [], [], []
    for number in range(300):
        words = [f"secret{number:03d}{part}word" for part in "abcdefgh"]
        text, revised = " ".join(words[:4] * (1 + number % 40)), " ".join(words[4:6])
        labels: dict[str, Any] = {"key": words[6] * (1 + number % 5), "tags": (words[7],)}
        vector = [1 / (number + 2)] * 64
        wanted.append(replace(new(f"{number}", text, **labels), embedding=vector))
        identity = reflection_id("scope", f"{number}")
        if number % 3 == 0:
            revisions.append(Rewriting(identity, "r", 1, text=revised))
        if number % 10 == 0:
            erased.append(identity)
            needles += [word.encode() for word in (words if number % 3 == 0 else words[:4] + words[6:])]
            needles.append(sqlite_bytes(vector)[:32])
    await asyncio.gather(*map(store.add, wanted))
    await asyncio.gather(*map(store.revise, revisions))
    await asyncio.gather(*map(store.delete, erased[:10]))
    before = contents(tmp_path)
    assert all(needle in before for needle in needles)
    await asyncio.gather(*map(store.erase, erased[:25]))
    for identity in erased[25:]:
        await store.erase(identity)
    after = contents(tmp_path)
    assert [needle for needle in needles if needle in after] == []
    assert b"secret001aword" in after, "the others are there"
    await store.close()
    assert [needle for needle in needles if needle in contents(tmp_path)] == []


def sqlite_bytes(vector: list[float]) -> bytes:
    written = tables.Embedding().process_bind_param(vector, sa.create_engine("sqlite://").dialect)
    assert isinstance(written, bytes)
    return written


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


async def test_what_a_crash_left_of_an_erasure_is_cleaned_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_in(tmp_path)
    added = await store.add(new("a", "a secret " * 500))
    with monkeypatch.context() as patched:
        patched.setattr(sqlite, "_clean", lambda db, path: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            await store.erase(added.reflection_id)
    assert b"a secret" in contents(tmp_path)
    await store.close()
    store = await open_in(tmp_path)
    assert b"a secret" not in contents(tmp_path)
    assert await store.erase(added.reflection_id) == 2
    await store.close()


async def test_a_failed_transaction_is_the_answer_to_all_of_it(tmp_path: Path) -> None:
    store = await open_in(tmp_path)
    nothing: Any = None
    wrong = replace(new("b"), provenance=replace(ORIGIN, environment=nothing))
    answers = await asyncio.gather(store.add(new("a")), store.add(wrong), return_exceptions=True)
    assert any(isinstance(answer, sqlite3.IntegrityError) for answer in answers)
    kept = sum(not isinstance(answer, Exception) for answer in answers)
    assert (await store.snapshot("scope")).version == kept
    await store.close()


async def test_searches_forget_what_was_rolled_back(tmp_path: Path) -> None:
    """A search sees the writes of its own transaction; this one is undone."""
    store = await open_in(tmp_path)
    await store.add(new("a", "first"))
    nothing: Any = None
    wrong = replace(new("c"), provenance=replace(ORIGIN, environment=nothing))
    calls = (store.add(new("b", "second")), store.find_words(selection(), "second", 9), store.add(wrong))
    await asyncio.gather(*calls, return_exceptions=True)
    found = await store.find_words(selection(), "first second", 9)
    assert {one.text for one in found.reflections} == {"first", "second"}
    await store.close()


async def test_a_full_disk_is_told_and_reads_are_answered(tmp_path: Path) -> None:
    """SQLite itself refuses: its limit of pages is what a full disk is to it."""
    store = await open_in(tmp_path)
    await store.add(new("first"))
    [(pages,)] = await store._read(lambda db: db.exec_driver_sql("PRAGMA page_count").all())
    await store._read(lambda db: db.exec_driver_sql(f"PRAGMA max_page_count = {pages}").all())
    long = "x" * 100_000
    answers: list[Any] = await asyncio.gather(
        *(store.add(new(f"{number}", long)) for number in range(3)),
        store.find(selection(), Order.NEWEST, 9),
        *(store.add(new(f"{number}", long)) for number in range(3, 6)),
        return_exceptions=True,
    )
    found = answers.pop(3)
    assert not isinstance(found, BaseException | Added) and [entry.text for entry in found.reflections] == ["text"]
    for answer in answers:
        assert isinstance(answer, DomainError) and answer.reason is Reason.DISK_FULL
        assert answer.metadata["folder"] == str(tmp_path)
    await store._read(lambda db: db.exec_driver_sql("PRAGMA max_page_count = 100000").all())
    assert (await store.add(new("0", long))).version == 2, "nothing of the refused writes is left"
    await store.close()


async def test_nothing_is_acknowledged_once_the_folder_was_removed(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    store = await open_in(folder)
    added = await store.add(new("first"))
    drawn = use("k", [added.reflection_id])
    await store.record_uses([drawn])
    shutil.rmtree(folder)
    calls = (*(store.add(new(f"{number}")) for number in range(3)), store.report([UseOutcome(drawn.use_id, 1)]))
    answers: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        assert isinstance(answer, DomainError) and answer.reason is Reason.FOLDER_REMOVED
        assert answer.metadata == {"folder": str(folder)}
    assert (await store.snapshot("scope")).version == 1, "reads are answered"
    await store.close()


@pytest.mark.parametrize(
    ("order", "index"),
    [
        (Order.NEWEST, "standings_success"),
        (Order.GAIN, "standings_gain"),
        (Order.UPLIFT, "standings_uplift"),
        (Order.FEWEST_USES, "standings_tries"),
    ],
)
async def test_each_order_is_a_walk_over_its_index(tmp_path: Path, order: Order, index: str) -> None:
    """Without it a read would sort all entries of the scope. Sorted are those that changed since the version."""
    store = await open_in(tmp_path)
    await store.add(new("a"))
    successes = order in (Order.NEWEST, Order.GAIN)
    plans: list[str] = []

    def look(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "standings.until_version IS NULL" in statement:
            rows = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.append("\n".join(row[-1] for row in rows))

    await store._read(lambda db: sa.event.listen(db, "before_cursor_execute", look))
    await store.find(selection(successes_only=successes, version=1), order, 5)
    await store.close()
    (plan,) = plans
    opened, closed = plan.split("UNION ALL")
    assert index in opened and "B-TREE" not in opened, plan
    assert "standings_closed" in closed, plan


async def test_a_first_search_reads_the_texts_in_parts_and_other_calls_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number of texts, with versions that begin and end within and between the parts."""
    monkeypatch.setattr(ranked, "BATCH", 3)
    store = await open_in(tmp_path)
    added = [await store.add(new(f"r{number}", f"boat number{number}")) for number in range(20)]
    await store.revise(Rewriting(added[4].reflection_id, "again", 1, text="a boat of others"))
    await store.erase(added[9].reflection_id)
    await store.close()
    store = await open_in(tmp_path)
    turns: list[str] = []
    real = ranked.Indexes.find_words

    def find_words(*given: Any) -> Found | None:
        turns.append("part")
        return real(*given)

    monkeypatch.setattr(ranked.Indexes, "find_words", find_words)

    async def other_calls() -> None:
        while turns.count("part") < 3:
            await store.snapshot("s")
            turns.append("call")

    found, _ = await asyncio.gather(store.find_words(selection(), "boat", 30), other_calls())
    assert [one.text for one in found.reflections] != [] and len(found.reflections) == 19
    assert turns.count("part") == 7 and "call" in turns[turns.index("part") : -1]
    assert (await store.find_words(selection(), "number9", 3)).reflections == ()
    assert [one.text for one in (await store.find_words(selection(), "others", 3)).reflections] == ["a boat of others"]
    await store.close()


async def test_a_report_of_more_entries_than_a_statement_takes_counts_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "_PART_SIZE", 2)
    store = await open_in(tmp_path)
    added = [(await store.add(new(f"r{number}", f"text {number}"))).reflection_id for number in range(5)]
    shown = [use("first", added), use("second", added[1:], added[3])]
    await store.record_uses(shown)
    for expected in (2, 0):
        assert await store.report([UseOutcome(one.use_id, 1.0) for one in shown]) == expected
    uplifts = [(await store.get(identity)).uplift for identity in added]
    assert [(one.uses_shown, one.uses_left_out) for one in uplifts if one] == [(1, 0), (1, 0), (1, 0), (1, 1), (1, 0)]
    await store.close()


async def test_searches_keep_nothing_of_what_was_erased(tmp_path: Path) -> None:
    store = await open_in(tmp_path)
    embedder = given.create(given.Settings(size=2))
    await store.use_embedder(embedder)
    kept = await store.add(replace(new("kept", "a word of both"), embedding=(1.0, 0.0)))
    gone = await store.add(replace(new("gone", "a secret of both"), embedding=(0.6, 0.8)))
    for text in ("word", "secret"):
        assert (await store.find_words(selection(), text, 1)).reflections
    assert len((await store.find_nearest(selection(), (1.0, 0.0), 5)).reflections) == 2
    await store.erase(gone.reflection_id)
    words, meaning = (kept.index for kept in store._indexes._kept.values())
    assert isinstance(words, WordIndex) and isinstance(meaning, DenseIndex)
    assert sorted(words._postings) == ["a", "both", "of", "word"] and words._lengths[:2].tolist() == [4, 0]
    assert meaning._rows[:2].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    for found in (store.find_words(selection(), "both", 5), store.find_nearest(selection(), (0.6, 0.8), 5)):
        assert [one.reflection_id for one in (await found).reflections] == [kept.reflection_id]
    await store.close()
