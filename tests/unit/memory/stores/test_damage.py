"""Damage of a memory's database: of a bit of its file, of a value of a row. It costs what it touches, and is told."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import StoredReflection, UseOutcome
from mulligan.memory.store import Order, Rewriting, Selection, Store, StoreError, reflection_id
from mulligan.memory.stores import sqlite
from mulligan.memory.stores._sql import sums
from mulligan.memory.stores._sql.migrations.versions import v5_checksums
from tests.support.damage import flips
from tests.support.stores import ALL, CountingEmbedder, new, refused, selection, use

REQUESTS = ("a", "b", "c", "d")
A, B, C, D = (reflection_id("scope", request) for request in REQUESTS)
TEXTS = {A: "walk around the hole", B: "take the left door first", C: "ask before you open", D: "both of these hold"}
EMBEDDER = CountingEmbedder("letters")
USES = [use(f"use-{number}", [A, B], A if number % 2 else "") for number in range(4)]


async def opened(path: Path) -> sqlite.SqliteStore:
    return await sqlite.open(str(path), sqlite.Settings())


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    path = tmp_path / "memory.db"
    store = await opened(path)
    await store.use_embedder(EMBEDDER)
    for identity, request in zip((A, B, C), REQUESTS, strict=False):
        text = TEXTS[identity]
        await store.add(replace(new(request, text), embedding=EMBEDDER.embed([text])[0].tolist()))
    await store.add(replace(new("d", TEXTS[D], key="doors", tags=("x", "y"), source_ids=(A, B)), actor="somebody"))
    await store.add(replace(new("known", TEXTS[A]), unless_known=True))
    await store.record_uses(USES)
    await store.report([UseOutcome(one.use_id, 0.75) for one in USES[:3]])
    await store.revise(Rewriting(C, "r", 1, key="asking"))
    await store.close()
    return path


@pytest.fixture
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect(path, isolation_level=None)
    yield db
    db.close()


def check(error: DomainError) -> None:
    assert error.reason is Reason.STATE_DAMAGED, error
    assert "memory.db" in error.message
    assert error.metadata["file"].endswith("memory.db")


async def answer(store: Store, identity: str) -> StoredReflection | None:
    """None where the entry is refused by name."""
    try:
        return await store.get(identity)
    except DomainError as error:
        if error.reason is not Reason.UNKNOWN_REFLECTION:  # its id is damaged, and its index was made anew
            check(error)
        return None


async def everything(store: Store) -> dict[str, Any]:
    """What all reads answer; the reason where one refuses."""
    everywhere = selection(statuses=ALL)
    reads: dict[str, Callable[[], Awaitable[Any]]] = {
        "list": lambda: store.list("scope", 0, 100, True),
        "newest": lambda: store.find(everywhere, Order.NEWEST, 10),
        "gain": lambda: store.find(everywhere, Order.GAIN, 10),
        "uplift": lambda: store.find(everywhere, Order.UPLIFT, 10),
        "then": lambda: store.find(replace(everywhere, version=4), Order.FEWEST_USES, 10),
        "words": lambda: store.find_words(everywhere, "take the left door", 10),
        "meaning": lambda: store.find_nearest(everywhere, EMBEDDER.embed([TEXTS[A]])[0].tolist(), 10),
        "changes": lambda: store.changes("", 0, 100),
        "snapshot": lambda: store.snapshot("scope"),
        "uses": lambda: store.uses_of(A, 10),
        "derived": lambda: store.derived_from(A),
    }
    found: dict[str, Any] = {}
    for name, read in reads.items():
        try:
            found[name] = await read()
        except DomainError as error:
            check(error)
            found[name] = error.reason
    return found


def is_part(found: Any, written: Any) -> bool:
    """Whether an answer is what was written, without what is damaged: the items of its only tuple."""
    if isinstance(found, Reason) or found == written:
        return True
    return set(items(found)) <= set(items(written)) if items(written) else False


def items(answer: Any) -> tuple[Any, ...]:
    if isinstance(answer, tuple):
        return answer
    return next((value for value in map(answer.__getattribute__, answer.__slots__) if isinstance(value, tuple)), ())


async def read_all(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries, None for one that is refused, and what all other reads answer. Nothing, where the store cannot be
    opened, which a named error tells."""
    try:
        store = await opened(path)
    except StoreError as error:
        return {}, {"error": str(error)}
    try:
        await store.use_embedder(EMBEDDER)
        return {identity: await answer(store, identity) for identity in TEXTS}, await everything(store)
    except DomainError as error:
        check(error)
        return {}, {"error": str(error)}
    finally:
        await store.close()


def test_each_single_bit_is_as_written_or_told(path: Path) -> None:
    entries, written = asyncio.run(read_all(path))
    assert None not in entries.values() and "error" not in written
    content = path.read_bytes()
    outcomes = {"same": 0, "told": 0, "refused": 0}
    for place, flipped in flips(content, 100):
        path.write_bytes(flipped)
        with capture_logs() as logs:
            found, read = asyncio.run(read_all(path))
        if "error" in read:
            assert "memory.db" in read["error"], place
            outcomes["refused"] += 1
            continue
        told = [entry for entry in logs if entry["log_level"] in ("error", "warning")]
        assert all(entry["file"].endswith("memory.db") for entry in told), place
        for identity, entry in found.items():
            assert entry in (None, entries[identity]), place
        for name, value in read.items():
            assert is_part(value, written[name]), f"{place}: {name}"
        changed = {name for name in written if read[name] != written[name]} - {"words", "meaning"}
        assert told or (found == entries and not changed), f"{place}: {changed}"
        outcomes["told" if told else "same"] += 1
    assert min(outcomes.values()) > 1, outcomes


# Of one row: what was changed, what is refused for it, and how it is called in the log.
CHANGES = [
    ("UPDATE texts SET text = 'walk into the hole' WHERE position = 1", A, "its text differs"),
    ("UPDATE texts SET text = CAST(x'ff00' AS TEXT) WHERE position = 1", A, "its text differs"),
    ("UPDATE texts SET until_version = 3 WHERE position = 1", A, "its text differs"),
    ("UPDATE texts SET id = 99 WHERE position = 1", A, "its text differs"),
    ("UPDATE texts SET crc = NULL WHERE position = 1", A, "its text differs"),
    ("UPDATE reflections SET reward_after = 0.5 WHERE position = 1", A, "its provenance differs"),
    ("UPDATE reflections SET kind = 'rulf' WHERE position = 1", A, "its provenance differs"),
    ("UPDATE reflections SET created_microseconds = 9e18 WHERE position = 1", A, "its provenance differs"),
    ("UPDATE reflections SET deleted_version = 2 WHERE position = 1", A, "its provenance differs"),
    ("UPDATE standings SET status = 'activf' WHERE position = 1", A, "its status or evidence differs"),
    ("UPDATE standings SET tags = '{' WHERE position = 4", D, "its status or evidence differs"),
    ("UPDATE standings SET key = 'keys' WHERE position = 4", D, "its status or evidence differs"),
    ("UPDATE standings SET mean_shown = 0.9 WHERE position = 1", A, "its status or evidence differs"),
    ("DELETE FROM standings WHERE position = 1", A, "its status or evidence differs"),
    ("DELETE FROM sources WHERE place = 1", D, "its sources differ"),
    ("UPDATE sources SET source = 3 WHERE place = 1", D, "its sources differ"),
]


@pytest.mark.parametrize(("change", "damaged", "cause"), CHANGES)
async def test_a_damaged_entry_is_refused_and_the_others_go_on(
    path: Path, raw: sqlite3.Connection, change: str, damaged: str, cause: str
) -> None:
    assert raw.execute(change).rowcount > 0
    store = await opened(path)
    error = await refused(store.get(damaged), Reason.STATE_DAMAGED)
    assert cause in error.message and damaged in error.message and "memory.db" in error.message
    assert error.metadata["file"] == str(path)
    for identity in set(TEXTS) - {damaged}:
        assert (await store.get(identity)).text == TEXTS[identity]
    with capture_logs() as logs:
        listed = (await store.list("", 0, 100, True)).reflections
        found = (await store.find(selection(statuses=ALL), Order.NEWEST, 10)).reflections
    assert damaged not in {one.reflection_id for one in (*listed, *found)}
    assert {one.reflection_id for one in listed} == set(TEXTS) - {damaged}
    assert logs == [], "it was told already"
    if "sources" not in cause:
        await refused(store.revise(Rewriting(damaged, "r2", 1, text="x")), Reason.STATE_DAMAGED)
    assert await store.report([UseOutcome(USES[3].use_id, 1.0)]) == 1, "the other entry of the use gets its evidence"
    await store.erase(damaged)
    await store.delete(C)
    await store.close()
    store = await opened(path)
    if "text" in cause:  # nothing is left of what was damaged
        assert (await store.get(damaged)).erased_version is not None
    else:
        await refused(store.get(damaged), Reason.STATE_DAMAGED)
    assert (await store.get(C)).deleted_version is not None
    await store.close()


async def test_the_log_tells_file_record_and_cause_once(path: Path, raw: sqlite3.Connection) -> None:
    raw.execute("UPDATE texts SET text = 'walk into the hole' WHERE position = 1")
    store = await opened(path)
    with capture_logs() as logs:
        for _ in range(3):
            await store.find(selection(), Order.NEWEST, 10)
    assert logs == [
        {
            "event": "a record is damaged",
            "log_level": "error",
            "file": str(path),
            "record": f"the reflection {A!r}",
            "problem": "its text differs from its checksum",
        }
    ]
    await store.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE scopes SET version = version - 1",
        "UPDATE scopes SET entries = entries + 1",
        "UPDATE scopes SET crc = 1",
    ],
)
async def test_a_damaged_scope_is_refused(path: Path, raw: sqlite3.Connection, change: str) -> None:
    store = await opened(path)
    await store.add(new("e", "text", "other"))
    await store.close()
    raw.execute(f"{change} WHERE name = 'scope'")
    store = await opened(path)
    everywhere = Selection("scope", "lake")
    for call in (store.snapshot("scope"), store.find(everywhere, Order.NEWEST, 3), store.add(new("f")), store.get(A)):
        assert "scope" in (await refused(call, Reason.STATE_DAMAGED)).message
    assert (await store.snapshot("other")).version == 1
    await store.close()


async def test_a_damaged_use_does_not_count(path: Path, raw: sqlite3.Connection) -> None:
    raw.execute("UPDATE uses SET holdout = 0.9 WHERE use_id = ?", (USES[3].use_id,))
    store = await opened(path)
    with capture_logs() as logs:
        assert await store.report([UseOutcome(USES[3].use_id, 1.0)]) == 0
        assert len(await store.uses_of(A, 10)) == 3
    assert [entry["record"] for entry in logs] == [f"the use {USES[3].use_id!r}"]
    await refused(store.record_uses([USES[3]]), Reason.STATE_DAMAGED)
    await store.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE evidence SET state = x'00' WHERE position = 1",
        "DELETE FROM evidence WHERE position = 1",
        "UPDATE evidence SET state = (SELECT state FROM evidence WHERE position = 2) WHERE position = 1",
    ],
)
async def test_damaged_evidence_does_not_grow(path: Path, raw: sqlite3.Connection, change: str) -> None:
    raw.execute(change)
    store = await opened(path)
    before = await store.get(A)
    with capture_logs() as logs:
        await store.report([UseOutcome(USES[3].use_id, 1.0)])
    assert [entry["record"] for entry in logs] == [f"the evidence of the reflection {A!r}"]
    assert (await store.get(A)).uplift == before.uplift
    await store.close()


async def test_damaged_lines_of_the_log_and_answers_are_not_read(path: Path, raw: sqlite3.Connection) -> None:
    raw.execute("UPDATE changes SET actor = 'nobody' WHERE id = 4")
    raw.execute("UPDATE answered SET position = 2")
    store = await opened(path)
    with capture_logs() as logs:
        page = await store.changes("", 0, 100)
    assert [entry["record"] for entry in logs] == ["line 4 of the log of writes"]
    assert [one.action for one in page.changes] == ["add", "add", "add", "repeat", "report", "revise"]
    await refused(store.add(replace(new("known", TEXTS[A]), unless_known=True)), Reason.STATE_DAMAGED)
    await store.close()


@pytest.mark.parametrize("embedding", [b"", b"abc", b"\x00\x00\xc0\x7f" * 26, b"\x00\x00\x80\x7f" * 26, b"\xff" * 4])
async def test_searches_leave_damaged_embeddings_and_texts_out(
    path: Path, raw: sqlite3.Connection, embedding: bytes
) -> None:
    raw.execute("UPDATE texts SET embedding = ? WHERE position = 2", (embedding,))
    raw.execute("UPDATE texts SET text = text || ' hole hole hole' WHERE position = 3")
    store = await opened(path)
    await store.use_embedder(EMBEDDER)
    vector = EMBEDDER.embed([TEXTS[A]])[0].tolist()
    with capture_logs() as logs:
        near = await store.find_nearest(selection(statuses=ALL), vector, 10)
        words = await store.find_words(selection(statuses=ALL), "hole", 10)
    assert {one.reflection_id for one in near.reflections} <= {A, D}
    assert [one.reflection_id for one in words.reflections] == [A]
    assert {entry["record"] for entry in logs} == {"the embedding of text 2", "text 3"}
    await store.close()


def overwrite(path: Path, raw: sqlite3.Connection, table: str, old: bytes, new: bytes) -> None:
    """In the root page of a table or an index."""
    [(page,)] = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,))
    content = bytearray(path.read_bytes())
    place = content.index(old, (page - 1) * 4096)
    content[place : place + len(new)] = new
    path.write_bytes(content)


async def test_nothing_is_written_to_a_file_whose_structure_is_damaged(path: Path, raw: sqlite3.Connection) -> None:
    overwrite(path, raw, "changes", b"", b"\x7f" * 4096)
    with capture_logs() as logs:
        store = await opened(path)
    assert [(entry["event"], entry["record"]) for entry in logs] == [("a record is damaged", "the file")]
    assert (await store.get(A)).text == TEXTS[A]
    assert len((await store.find(selection(statuses=ALL), Order.NEWEST, 10)).reflections) == 4
    for call in (store.changes("", 0, 9), store.add(new("e"))):
        assert "memory.db is damaged" in (await refused(call, Reason.STATE_DAMAGED)).message
    await store.close()


async def test_a_damaged_index_is_made_anew(path: Path, raw: sqlite3.Connection) -> None:
    overwrite(path, raw, "standings_newest", b"lake", b"make")
    with capture_logs() as logs:
        store = await opened(path)
    assert [entry["event"] for entry in logs] == ["damaged indexes of a database were made anew"]
    assert len((await store.find(selection(statuses=ALL), Order.NEWEST, 10)).reflections) == 4
    await store.close()


def test_the_migration_sums_what_the_tables_sum(path: Path) -> None:
    covered = {table.name: " ".join(column.name for column in columns) for table, columns in sums.COVERED.items()}
    assert covered == v5_checksums._COVERED
    engine = sa.create_engine(f"sqlite:///{path}")
    tables = (*covered, "reflections")
    wanted = [sa.text(f"SELECT crc FROM {name} ORDER BY rowid") for name in covered]
    with engine.begin() as db:
        before = [db.execute(one).all() for one in wanted]
        sources = db.execute(sa.text("SELECT source_sum FROM reflections")).all()
        for name in tables:
            db.execute(sa.text(f"UPDATE {name} SET crc = NULL"))
        db.execute(sa.text("UPDATE reflections SET source_sum = NULL"))
        v5_checksums.fill(db)
        assert [db.execute(one).all() for one in wanted] == before
        assert db.execute(sa.text("SELECT source_sum FROM reflections")).all() == sources
    engine.dispose()
    assert all(rows for rows in before), "each table has rows"
