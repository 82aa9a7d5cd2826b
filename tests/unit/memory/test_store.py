"""Every memory store against a model of a few lines of Python: versions, reads as of a version, idempotency, deletion.

A new store is added to STORES.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import Provenance, RetrievalStrategy, StoredReflection
from mulligan.memory.store import Added, Store, StoreError
from mulligan.memory.stores import sqlite
from tests.support.effort import examples

STORES = {"sqlite": partial(sqlite.open, settings=sqlite.Settings())}
T = TypeVar("T")
ORIGIN = Provenance("run", "experience", "lake", "train/00001", 3, 0.0, 1.0, True)

scopes = st.sampled_from(["run-1", "run-2", "shared"])
environments = st.sampled_from(["lake", "maze"])
provenances = st.builds(
    Provenance,
    st.just("run"),
    st.sampled_from(["x1", "x2"]),
    environments,
    st.text(max_size=3),
    st.integers(0, 2**63 - 1),
    st.sampled_from([0.0, 0.25, -1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
)


@dataclass
class Entry:
    reflection_id: str
    scope: str
    request_id: str
    text: str
    provenance: Provenance
    version: int
    deleted_version: int | None = None


class Model:
    """What a store is to do, without any thought of speed."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.versions: dict[str, int] = {}

    def next_version(self, scope: str) -> int:
        self.versions[scope] = self.versions.get(scope, 0) + 1
        return self.versions[scope]

    def at(self, scope: str, version: int) -> list[Entry]:
        return [
            entry
            for entry in self.entries
            if entry.scope == scope
            and entry.version <= version
            and (entry.deleted_version is None or entry.deleted_version > version)
        ]

    def query(self, scope: str, environment: str, strategy: RetrievalStrategy, limit: int, version: int) -> list[Entry]:
        found = [
            entry
            for entry in self.at(scope, version)
            if entry.provenance.environment == environment and entry.provenance.success
        ]

        def gain(entry: Entry) -> float:
            return entry.provenance.reward_after - entry.provenance.reward_before

        found.sort(key=lambda entry: -entry.version)
        if strategy is RetrievalStrategy.TOP_GAIN:
            found.sort(key=lambda entry: -gain(entry))  # stable: among equals the latest
        return found[:limit]


class StoreMachine(RuleBasedStateMachine):
    """Random calls; after each, the store must agree with the model. It is also closed and opened again at times."""

    kind = "sqlite"
    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.model = Model()
        self.store = self.open()

    def open(self) -> Store:
        return self.run(STORES[self.kind](f"{self.folder.name}/memory.db"))

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.close()
        self.folder.cleanup()

    @rule(target=ids, request=st.sampled_from("abcdef"), scope=scopes, text=st.text(max_size=5), origin=provenances)
    def add(self, request: str, scope: str, text: str, origin: Provenance) -> Any:
        known = [entry for entry in self.model.entries if (entry.scope, entry.request_id) == (scope, request)]
        call = self.store.add(request, scope, text, origin)
        if not known:
            added = self.run(call)
            assert added.version == self.model.next_version(scope)
            self.model.entries.append(Entry(added.reflection_id, scope, request, text, origin, added.version))
            return added.reflection_id
        if (known[0].text, known[0].provenance) == (text, origin):
            assert self.run(call).version == known[0].version
        else:
            with pytest.raises(DomainError) as caught:
                self.run(call)
            assert caught.value.reason is Reason.REQUEST_CONFLICT
        return multiple()

    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        if self.model.entries:
            entry = data.draw(st.sampled_from(self.model.entries))
            added = self.run(self.store.add(entry.request_id, entry.scope, entry.text, entry.provenance))
            assert (added.reflection_id, added.version) == (entry.reflection_id, entry.version)

    @rule(reflection_id=ids)
    def delete(self, reflection_id: str) -> None:
        (entry,) = [entry for entry in self.model.entries if entry.reflection_id == reflection_id]
        if entry.deleted_version is None:
            entry.deleted_version = self.model.next_version(entry.scope)
        assert self.run(self.store.delete(reflection_id)) == entry.deleted_version

    @rule(
        scope=scopes,
        environment=environments,
        strategy=st.sampled_from(RetrievalStrategy),
        limit=st.integers(1, 4),
        back=st.none() | st.integers(-1, 5),
    )
    def query(self, scope: str, environment: str, strategy: RetrievalStrategy, limit: int, back: int | None) -> None:
        newest = self.model.versions.get(scope, 0)
        version = None if back is None else max(newest - back, 0)
        call = self.store.query(scope, environment, strategy, limit, version)
        if version is not None and version > newest:
            with pytest.raises(DomainError) as caught:
                self.run(call)
            assert caught.value.reason is Reason.UNKNOWN_VERSION
            return
        found = self.run(call)
        read = newest if version is None else version
        expected = self.model.query(scope, environment, strategy, limit, read)
        assert found.version == read
        assert [stored.reflection_id for stored in found.reflections] == [entry.reflection_id for entry in expected]
        for stored, entry in zip(found.reflections, expected, strict=True):
            self.agree(stored, entry)

    @rule(scope=scopes | st.just(""), size=st.integers(1, 3), deleted=st.booleans())
    def list(self, scope: str, size: int, deleted: bool) -> None:
        expected = [
            entry
            for entry in self.model.entries
            if entry.scope == (scope or entry.scope) and (deleted or entry.deleted_version is None)
        ]
        found: list[StoredReflection] = []
        position: int | None = 0
        while position is not None:
            page = self.run(self.store.list(scope, position, size, deleted))
            found += page.reflections
            position = page.next_position
        assert len(found) == len(expected)
        for stored, entry in zip(found, expected, strict=True):
            self.agree(stored, entry)

    @rule()
    def open_again(self) -> None:
        self.run(self.store.close())
        self.store = self.open()

    @invariant()
    def snapshots_agree(self) -> None:
        for scope in ("run-1", "run-2", "shared"):
            snapshot = self.run(self.store.snapshot(scope))
            version = self.model.versions.get(scope, 0)
            assert (snapshot.version, snapshot.reflection_count) == (version, len(self.model.at(scope, version)))

    def agree(self, stored: StoredReflection, entry: Entry) -> None:
        assert stored == StoredReflection(
            entry.reflection_id,
            entry.scope,
            entry.text,
            entry.provenance,
            entry.version,
            stored.created_at,
            entry.deleted_version,
        )


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=examples(15), stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow]
)


async def test_concurrent_writers_get_a_version_each(tmp_path: Path) -> None:
    store = await sqlite.open(str(tmp_path / "memory.db"), sqlite.Settings())
    added = await asyncio.gather(*(store.add(f"request-{n}", "scope", "text", ORIGIN) for n in range(300)))
    assert sorted(one.version for one in added) == list(range(1, 301))
    same = await asyncio.gather(*(store.add("request-7", "scope", "text", ORIGIN) for _ in range(20)))
    assert set(same) == {added[7]}
    await store.close()


async def test_a_conflict_does_not_undo_its_neighbours(tmp_path: Path) -> None:
    """Calls that wait together share a transaction; one of them may be refused."""
    store = await sqlite.open(str(tmp_path / "memory.db"), sqlite.Settings())
    await store.add("a", "scope", "text", ORIGIN)
    calls = [store.add(name, "scope", "other text", ORIGIN) for name in ("b", "a", "c")]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer).__name__ for answer in answers] == ["Added", "DomainError", "Added"]
    assert (await store.snapshot("scope")).version == 3
    await store.close()


async def test_unknown_reflections_are_named(tmp_path: Path) -> None:
    store = await sqlite.open(str(tmp_path / "memory.db"), sqlite.Settings())
    for call in (store.get("nothing"), store.delete("nothing")):
        with pytest.raises(DomainError, match="'nothing'") as caught:
            await call
        assert caught.value.reason is Reason.UNKNOWN_REFLECTION
    await store.close()


async def test_a_second_server_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = str(tmp_path / "memory.db")
    first = await sqlite.open(path, sqlite.Settings())
    with pytest.raises(StoreError, match=r"memory\.db is in use by another process"):
        await sqlite.open(path, sqlite.Settings())
    await first.close()
    await (await sqlite.open(path, sqlite.Settings())).close()


async def test_a_database_of_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    await (await sqlite.open(str(path), sqlite.Settings())).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE schema_version SET version = 99")
    db.close()
    with pytest.raises(StoreError, match="has schema 99, and this program knows schemas up to"):
        await sqlite.open(str(path), sqlite.Settings())


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


async def test_a_failed_transaction_is_the_answer_to_all_of_it(tmp_path: Path) -> None:
    store = await sqlite.open(str(tmp_path / "memory.db"), sqlite.Settings())
    nothing: Any = None
    wrong = replace(ORIGIN, reward_after=nothing)
    answers = await asyncio.gather(
        store.add("a", "scope", "text", ORIGIN), store.add("b", "scope", "text", wrong), return_exceptions=True
    )
    assert any(isinstance(answer, sqlite3.IntegrityError) for answer in answers)
    kept = sum(not isinstance(answer, Exception) for answer in answers)
    assert (await store.snapshot("scope")).version == kept
    await store.close()


async def test_a_full_disk_is_told_and_reads_are_answered(tmp_path: Path) -> None:
    """SQLite itself refuses: its limit of pages is what a full disk is to it."""
    store = await sqlite.open(str(tmp_path / "memory.db"), sqlite.Settings())
    await store.add("first", "scope", "text", ORIGIN)
    [(pages,)] = await store._do(lambda db: db.execute("PRAGMA page_count").fetchall())
    await store._do(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchall())
    long = "x" * 100_000
    answers: list[Any] = await asyncio.gather(
        *(store.add(f"{number}", "scope", long, ORIGIN) for number in range(3)),
        store.query("scope", ORIGIN.environment, RetrievalStrategy.LATEST_SUCCESS, 9, None),
        *(store.add(f"{number}", "scope", long, ORIGIN) for number in range(3, 6)),
        return_exceptions=True,
    )
    found = answers.pop(3)
    assert not isinstance(found, BaseException | Added) and [entry.text for entry in found.reflections] == ["text"]
    for answer in answers:
        assert isinstance(answer, DomainError) and answer.reason is Reason.DISK_FULL
        assert answer.metadata["folder"] == str(tmp_path)
    await store._do(lambda db: db.execute("PRAGMA max_page_count = 100000").fetchall())
    assert (await store.add("0", "scope", long, ORIGIN)).version == 2, "nothing of the refused writes is left"
    await store.close()


async def test_nothing_is_acknowledged_once_the_folder_was_removed(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    store = await sqlite.open(str(folder / "memory.db"), sqlite.Settings())
    await store.add("first", "scope", "text", ORIGIN)
    shutil.rmtree(folder)
    answers: list[Any] = await asyncio.gather(
        *(store.add(f"{number}", "scope", "lost", ORIGIN) for number in range(3)), return_exceptions=True
    )
    for answer in answers:
        assert isinstance(answer, DomainError) and answer.reason is Reason.FOLDER_REMOVED
        assert answer.metadata == {"folder": str(folder)}
    assert (await store.snapshot("scope")).version == 1, "reads are answered"
    await store.close()
