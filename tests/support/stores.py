"""What every store of the memory service passes. Random calls are compared with `acme.notes`, which keeps a copy of all
entries for each version.

A store's test module has a subclass of `StoreChecks`, and a test case of random calls, `random_calls(...)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest import TestCase

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import (
    Labels,
    MemoryChange,
    Provenance,
    RecordedUse,
    ReflectionKind,
    ReflectionStatus,
    StoredReflection,
    UseOutcome,
)
from mulligan.memory.store import (
    RETRIEVED,
    Added,
    DrawnUse,
    Found,
    NewReflection,
    Order,
    Rewriting,
    Selection,
    Store,
    use_id,
)
from tests.support.distribution.acme import notes
from tests.support.effort import examples

T = TypeVar("T")
Open = Callable[[], Awaitable[Store]]  # opens the same database each time

ORIGIN = Provenance("run", "experience", "lake", "train/00001", 3, 0.0, 1.0, True)
SCOPES = ("run-1", "run-2")
ENVIRONMENTS = ("lake", "maze")
ALL = frozenset(ReflectionStatus)
_EPOCH = datetime.fromtimestamp(0, UTC)
_VECTORS = [(1.0, 0.0, 0.0, 0.0), (0.0, 0.0, -1.0, 0.0), (0.5, 0.5, 0.5, 0.5), (0.5, -0.5, 0.5, -0.5)]  # exact products
_WORDS = ("ice", "hole", "left", "goal")


class GivenVectors:
    """Embeds nothing: all embeddings come with the entries."""

    name = "given"
    size = 4

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.zeros((len(texts), self.size), np.float32)


class CountingEmbedder:
    """A vector of how often each letter occurs."""

    size = 26

    def __init__(self, name: str) -> None:
        self.name = name
        self.embedded = 0

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.embedded += len(texts)
        rows = np.array([[text.count(chr(97 + letter)) for letter in range(26)] for text in texts], np.float32)
        lengths: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows / np.maximum(lengths, 1e-9)).astype(np.float32)


def new(request: str, text: str = "text", scope: str = "scope", **labels: Any) -> NewReflection:
    return NewReflection(request, scope, text, ORIGIN, Labels(**labels))


def selection(version: int | None = None, scope: str = "scope", **filters: Any) -> Selection:
    return Selection(scope, ORIGIN.environment, version, **filters)


def use(key: str, entries: Sequence[str], left_out: str = "", holdout: float = 0.5, scope: str = "scope") -> DrawnUse:
    """One of the first revisions of these entries."""
    of = tuple((identity, 1) for identity in entries)
    return DrawnUse(use_id(scope, key), key, scope, of, left_out, holdout / len(of))


async def harm(store: Store, identity: str, begin: int = 0, *, help_instead: bool = False) -> None:
    """Reports uses from which it follows that the entry harms."""
    drawn = [use(f"{identity}/{n}", [identity], identity if n % 2 else "") for n in range(begin, begin + 80)]
    await store.record_uses(drawn)
    await store.report([UseOutcome(one.use_id, float(bool(one.left_out_id) != help_instead)) for one in drawn])


async def refused(call: Awaitable[object], reason: Reason) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await call
    assert caught.value.reason is reason
    return caught.value


class StoreChecks:
    """A subclass has a fixture `open_store`, an `Open`."""

    @pytest.fixture
    async def store(self, open_store: Open) -> AsyncIterator[Store]:
        store = await open_store()
        yield store
        await store.close()

    async def test_concurrent_writers_get_a_version_each(self, store: Store) -> None:
        added = await asyncio.gather(*(store.add(new(f"request-{n}")) for n in range(300)))
        assert sorted(one.version for one in added) == list(range(1, 301))
        same = await asyncio.gather(*(store.add(new("request-7")) for _ in range(20)))
        assert set(same) == {added[7]}

    async def test_a_conflict_does_not_undo_its_neighbours(self, store: Store) -> None:
        """Calls that wait together may share a transaction; one of them may be refused."""
        await store.add(new("a"))
        calls = [store.add(new(name, "other text")) for name in ("b", "a", "c")]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer).__name__ for answer in answers] == ["Added", "DomainError", "Added"]
        assert (await store.snapshot("scope")).version == 3

    async def test_unknown_reflections_are_named(self, store: Store) -> None:
        calls = (
            store.get("nothing"),
            store.delete("nothing"),
            store.erase("nothing"),
            store.uses_of("nothing", 1),
            store.revise(Rewriting("nothing", "r", 1)),
            store.add(new("a", source_ids=("nothing",))),
        )
        for call in calls:
            assert "'nothing'" in str(await refused(call, Reason.UNKNOWN_REFLECTION))
        assert await store.derived_from("nothing") == ()

    async def test_of_concurrent_revisions_one_wins_and_no_update_is_lost(self, store: Store) -> None:
        """Twenty writers add a word each: they read the text, and try again when another was faster."""
        added = await store.add(new("a", "begin", kind=ReflectionKind.DOCUMENT))

        async def append(word: str) -> None:
            while True:
                seen = await store.get(added.reflection_id)
                text = f"{seen.text} {word}"
                try:
                    await store.revise(Rewriting(added.reflection_id, f"{word}", seen.revision, text=text))
                except DomainError as error:
                    if error.reason is not Reason.REVISION_CONFLICT or int(error.metadata["revision"]) <= seen.revision:
                        raise
                else:
                    return

        await asyncio.gather(*(append(f"w{n}") for n in range(20)))
        stored = await store.get(added.reflection_id)
        assert sorted(stored.text.split()) == sorted(["begin", *(f"w{n}" for n in range(20))])
        assert stored.revision == 21 and (await store.snapshot("scope")).version == 21

    async def test_pages_are_stable_while_others_write(self, store: Store) -> None:
        before = [(await store.add(new(f"{n}"))).reflection_id for n in range(20)]
        seen: list[str] = []
        position: int | None = 0
        while position is not None:
            page = await store.list("scope", position, 3, True)
            seen += [one.reflection_id for one in page.reflections]
            position = page.next_position
            if len(seen) < 15:
                await store.add(new(f"meanwhile-{len(seen)}"))
                await store.delete(seen[-1])
        assert seen[:20] == before and len(seen) == len(set(seen)) == 24
        changes = await store.changes("scope", 0, 1000)
        assert [change.version for change in changes.changes] == list(range(1, 29)) and changes.next_position is None

    async def test_a_text_that_is_known_is_not_stored_again(self, open_store: Open) -> None:
        store = await open_store()
        one = await store.add(new("one", "same"))
        two = await store.add(new("two", "same"))
        calls = [replace(new(f"call-{n}", "same"), unless_known=True) for n in range(20)]
        assert set(await asyncio.gather(*map(store.add, calls))) == {one}, "the oldest"
        fresh = [replace(new(f"fresh-{n}", "fresh"), unless_known=True) for n in range(20)]
        assert {added.version for added in await asyncio.gather(*map(store.add, fresh))} == {23}, "one of them"
        best = (await store.find(selection(), Order.UPLIFT, 3)).reflections
        assert [entry.text for entry in best] == ["fresh", "same", "same"]
        assert best[1].reflection_id == one.reflection_id, "it was written last"
        maze = replace(new("maze", "same"), provenance=replace(ORIGIN, environment="maze"))
        for other in (new("kind", "same", kind=ReflectionKind.EPISODE), new("scope", "same", scope="other"), maze):
            assert await store.add(replace(other, unless_known=True)) not in (one, two), other.request_id
        await store.revise(Rewriting(one.reflection_id, "r", 1, text="rewritten"))
        await store.revise(Rewriting(two.reflection_id, "r", 1, status=ReflectionStatus.RETIRED))
        assert await store.add(replace(new("later", "same"), unless_known=True)) == two, "whatever its status"
        assert await store.add(replace(new("later still", "rewritten"), unless_known=True)) == one
        await store.close()
        store = await open_store()
        assert await store.add(calls[0]) == await store.add(new("call-0", "same")) == one, "the first answer"
        await refused(store.add(replace(calls[0], text="other")), Reason.REQUEST_CONFLICT)
        await store.erase(two.reflection_id)
        await store.delete(one.reflection_id)
        assert await store.add(replace(new("later", "anything"), unless_known=True)) == two, "of the erased one"
        assert await store.add(calls[0]) == one
        again = await store.add(replace(new("again", "same"), unless_known=True))
        assert again not in (one, two), "no entry has it any more"
        await store.close()

    async def test_a_use_counts_once_also_after_it_is_opened_again(self, open_store: Open) -> None:
        store = await open_store()
        identity = (await store.add(new("a"))).reflection_id
        drawn = [use(f"k{n}", [identity], identity if n % 2 else "") for n in range(4)]
        await store.record_uses(drawn)
        assert await store.report([UseOutcome(drawn[0].use_id, 0.25), UseOutcome(drawn[0].use_id, 1.0)]) == 1
        await store.close()
        store = await open_store()
        await store.record_uses(drawn)
        everything = [UseOutcome(one.use_id, 0.75) for one in drawn]
        assert await store.report(everything) == 3
        assert await store.report(everything) == 0
        uplift = (await store.get(identity)).uplift
        assert uplift is not None and (uplift.uses_shown, uplift.uses_left_out) == (2, 2)
        assert uplift.mean_shown == 0.5, "the reward that was reported first"
        assert (await store.snapshot("scope")).version == 3
        await refused(store.report([UseOutcome(drawn[0].use_id, 0), UseOutcome("none", 0)]), Reason.UNKNOWN_USE)
        await store.close()

    async def test_what_harms_is_quarantined_and_recovers(self, store: Store) -> None:
        bad = (await store.add(new("bad"))).reflection_id
        good = (await store.add(new("good"))).reflection_id
        await harm(store, bad)
        quarantined = (await store.snapshot("scope")).version
        assert (await store.get(bad)).status is ReflectionStatus.QUARANTINED
        assert _ids(await store.find(selection(), Order.NEWEST, 9)) == [good]
        explored = await store.find(selection(statuses=ALL), Order.FEWEST_USES, 9)
        assert _ids(explored) == [good, bad]
        for begin in range(80, 800, 80):
            await harm(store, bad, begin, help_instead=True)
        assert (await store.get(bad)).status in RETRIEVED
        assert set(_ids(await store.find(selection(), Order.NEWEST, 9))) == {good, bad}
        assert _ids(await store.find(selection(quarantined), Order.NEWEST, 9)) == [good]
        actions = [change.action for change in (await store.changes("scope", 0, 1000)).changes]
        assert actions.count("quarantine") == 1 and actions.count("recover") + actions.count("activate") >= 1

    async def test_an_erased_entry_leaves_its_evidence(self, store: Store) -> None:
        identity = (await store.add(new("a", "secret", key="hush", tags=("private",)))).reflection_id
        other = (await store.add(new("b", "secret"))).reflection_id
        await harm(store, identity)
        assert await store.erase(identity) == 4 == await store.erase(identity) == await store.delete(identity)
        stored = await store.get(identity)
        assert (stored.text, stored.key, stored.tags, stored.erased_version) == ("", "", (), 4)
        assert stored.uplift is not None and len(await store.uses_of(identity, 100)) == 80
        error = await refused(store.find(selection(1), Order.NEWEST, 9), Reason.SNAPSHOT_REDACTED)
        assert error.metadata["version"] == "4"
        await refused(store.find_words(selection(3), "secret", 9), Reason.SNAPSHOT_REDACTED)
        assert _ids(await store.find_words(selection(), "secret", 9)) == [other]
        assert (await store.add(new("a", "something else"))).version == 1

    async def test_an_old_version_keeps_its_ranking_whatever_is_written_later(self, store: Store) -> None:
        """Statistics of words come from the texts of the version, not from those of today or of other scopes."""
        for number, text in enumerate(("ice ice hole", "hole left", "left left goal ice", "goal")):
            await store.add(new(f"{number}", text))
        queries = ("ice hole", "left goal", "goal", "ice left")
        before = [_ids(await store.find_words(selection(4), query, 3)) for query in queries]
        for number in range(40):
            await store.add(new(f"later-{number}", "goal goal hole"))
            await store.add(new(f"elsewhere-{number}", "ice", scope="other"))
        after = [_ids(await store.find_words(selection(4), query, 3)) for query in queries]
        assert after == before

    async def test_entries_are_embedded_anew_by_another_embedder(self, open_store: Open) -> None:
        store = await open_store()
        await store.use_embedder(None)
        texts = [f"{'ab' * (number % 9)} c" for number in range(600)]
        added = await asyncio.gather(*(store.add(new(f"{n}", text)) for n, text in enumerate(texts)))
        await store.close()
        first, second = CountingEmbedder("first"), CountingEmbedder("second")
        for embedder, embedded in ((first, 600), (first, 600), (second, 600)):
            store = await open_store()
            await store.use_embedder(embedder)
            assert embedder.embedded == embedded, "each text once"
            vector = [float(number) for number in embedder.embed(["c"])[0]]
            embedder.embedded -= 1
            found = await store.find_nearest(selection(), vector, 3)
            expected = [one.reflection_id for one, text in zip(added, texts, strict=True) if text == " c"]
            assert _ids(found) == expected[::-1][:3]
            await store.close()

    async def test_the_nearest_are_all_found_among_many(self, store: Store) -> None:
        random = np.random.default_rng(7)
        vectors = random.normal(size=(500, 16)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        embedder = CountingEmbedder("vectors")
        embedder.size = 16
        await store.use_embedder(embedder)
        added = await asyncio.gather(
            *(store.add(replace(new(f"{n}"), embedding=[float(x) for x in row])) for n, row in enumerate(vectors))
        )
        for query in vectors[:5] + 0.1 * vectors[5:10]:
            best = np.argsort(-(vectors.astype(np.float64) @ query), kind="stable")[:20]
            found = await store.find_nearest(selection(), [float(x) for x in query], 20)
            assert _ids(found) == [added[place].reflection_id for place in best]


def _ids(found: Found) -> list[str]:
    return [one.reflection_id for one in found.reflections]


_provenances = st.builds(
    Provenance,
    st.just("run"),
    st.sampled_from(["x1", "x2\0"]),
    st.sampled_from(ENVIRONMENTS),
    st.sampled_from(["", "a/1", "a/2", "A/1", "%a"]),
    st.integers(0, 2**63 - 1),
    st.sampled_from([0.0, 0.25, -1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
)
_texts = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=4).map(" ".join) | st.text(min_size=1, max_size=3)
_keys = st.sampled_from(["", "tool", "Tool", "\0"])
_tags = st.lists(st.sampled_from(["x", "X", 'x","y', "\n", "\x00", "ö"]), max_size=3, unique=True).map(tuple)
_vectors = st.sampled_from([(0.0, 0.0, 0.0, 0.0), *_VECTORS])
_back = st.none() | st.integers(-1, 40)


class _Calls(RuleBasedStateMachine):
    """Random calls, of which each goes to the store and to the notes, and gets the same answer. The store is also
    closed and opened again at times. What was read of a version when it was the newest is read again at the end."""

    open_in: Callable[[Path], Awaitable[Store]]

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.notes = notes.Notes(notes.Settings())
        self.store = self._open()
        self.ids: list[str] = []
        self.uses: list[DrawnUse] = []
        self.seen: dict[tuple[str, str, int], Any] = {}  # by scope, environment, version

    def _open(self) -> Store:
        store = self.run(type(self).open_in(Path(self.folder.name)))
        self.run(store.use_embedder(GivenVectors()))
        return store

    def run(self, call: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await call

        return self.loop.run_until_complete(awaited())

    def teardown(self) -> None:
        try:
            self._read_all_versions_again()
        finally:
            self.run(self.store.close())
            self.loop.close()
            self.folder.cleanup()

    def both(self, call: Callable[[Store], Coroutine[Any, Any, T]]) -> T | None:
        """The answer of both, None if both refuse the call."""
        expected = self.run(_answer(call(self.notes)))
        assert self.run(_answer(call(self.store))) == expected
        return None if isinstance(expected, tuple) and expected[:1] == ("refused",) else expected

    def some_id(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(self.ids))

    @rule(
        request=st.sampled_from("abcdef"),
        scope=st.sampled_from(SCOPES),
        text=_texts,
        origin=_provenances,
        kind=st.sampled_from(ReflectionKind),
        key=_keys,
        tags=_tags,
        vector=_vectors,
        unless_known=st.booleans(),
        data=st.data(),
    )
    def add(
        self,
        request: str,
        scope: str,
        text: str,
        origin: Provenance,
        kind: ReflectionKind,
        key: str,
        tags: tuple[str, ...],
        vector: tuple[float, ...],
        unless_known: bool,
        data: st.DataObject,
    ) -> None:
        sources = data.draw(st.lists(st.sampled_from(self.ids), max_size=2, unique=True)) if self.ids else []
        wanted = NewReflection(
            request, scope, text, origin, Labels(kind, key, tags, tuple(sources)), vector, "somebody", unless_known
        )
        added = self.both(lambda store: store.add(wanted))
        if added is not None and added.reflection_id not in self.ids:
            self.ids.append(added.reflection_id)
            assert added == self.both(lambda store: store.add(wanted))

    @precondition(lambda self: self.ids)
    @rule(
        data=st.data(),
        request=st.sampled_from("rst"),
        behind=st.sampled_from([0, 0, 0, 1]),
        text=st.none() | _texts,
        key=st.none() | _keys,
        tags=st.none() | _tags,
        status=st.sampled_from([None, None, ReflectionStatus.RETIRED, ReflectionStatus.CANDIDATE]),
        vector=_vectors,
    )
    def revise(self, data: st.DataObject, request: str, behind: int, vector: tuple[float, ...], **changed: Any) -> None:
        identity = self.some_id(data)
        revision = self.run(self.notes.get(identity)).revision - behind
        rewriting = Rewriting(identity, request, revision, **changed, embedding=vector)
        self.both(lambda store: store.revise(rewriting))

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        identity = self.some_id(data)
        self.both(lambda store: store.delete(identity, "me"))

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), really=st.sampled_from([True, False, False]))
    def erase(self, data: st.DataObject, really: bool) -> None:
        identity = self.some_id(data)
        if really:
            self.both(lambda store: store.erase(identity, "me"))

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), key=st.sampled_from("klmn"), holdout=st.sampled_from([0.0, 0.25]))
    def draw(self, data: st.DataObject, key: str, holdout: float) -> None:
        first = self.run(self.notes.get(self.some_id(data)))
        stored = [self.run(self.notes.get(identity)) for identity in self.ids]
        there = [(one.reflection_id, one.revision) for one in stored if one.scope == first.scope]
        entries = data.draw(st.lists(st.sampled_from(there), min_size=1, max_size=3, unique=True))
        left_out = data.draw(st.sampled_from(["", *(identity for identity, _ in entries)])) if holdout else ""
        drawn = DrawnUse(use_id(first.scope, key), key, first.scope, tuple(entries), left_out, holdout / len(entries))
        self.both(lambda store: store.record_uses([drawn, drawn]))
        self.uses.append(drawn)

    @precondition(lambda self: self.uses)
    @rule(data=st.data(), reward=st.sampled_from([0.0, 0.3, 1.0]), unknown=st.sampled_from([False, False, True]))
    def report(self, data: st.DataObject, reward: float, unknown: bool) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.uses), min_size=1, max_size=3))
        outcomes = [UseOutcome(one.use_id, reward) for one in chosen] + [UseOutcome("none", 1.0)] * unknown
        self.both(lambda store: store.report(outcomes, "me"))

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), harms=st.booleans())
    def report_many(self, data: st.DataObject, harms: bool) -> None:
        """Enough for another status."""
        stored = self.run(self.notes.get(self.some_id(data)))
        names = [f"{len(self.uses)}/{number}" for number in range(60)]
        drawn = [
            DrawnUse(
                use_id(stored.scope, name),
                name,
                stored.scope,
                ((stored.reflection_id, stored.revision),),
                stored.reflection_id if number % 2 else "",
                0.5,
            )
            for number, name in enumerate(names)
        ]
        self.both(lambda store: store.record_uses(drawn))
        outcomes = [UseOutcome(one.use_id, float(bool(one.left_out_id) == harms)) for one in drawn]
        self.both(lambda store: store.report(outcomes))
        self.uses.append(drawn[0])

    @rule(
        order=st.sampled_from(Order),
        limit=st.integers(0, 4),
        scope=st.sampled_from([*SCOPES, "empty"]),
        environment=st.sampled_from(ENVIRONMENTS),
        back=_back,
        successes_only=st.booleans(),
        statuses=st.sampled_from([RETRIEVED, ALL, frozenset({ReflectionStatus.QUARANTINED})]),
        kinds=st.sampled_from([(), (ReflectionKind.RULE,), (ReflectionKind.EPISODE, ReflectionKind.DOCUMENT)]),
        key=_keys,
        tags=st.sampled_from([(), (), ("x",), ("y",), ("x", "\n")]),
        task_prefix=st.sampled_from(["", "", "a/", "%"]),
    )
    def find(self, order: Order, limit: int, scope: str, environment: str, back: int | None, **filters: Any) -> None:
        wanted = Selection(scope, environment, self._version(scope, back), **filters)
        self.both(lambda store: store.find(wanted, order, limit))

    @rule(
        scope=st.sampled_from(SCOPES),
        environment=st.sampled_from(ENVIRONMENTS),
        back=_back,
        vector=st.sampled_from(_VECTORS),
    )
    def find_nearest(self, scope: str, environment: str, back: int | None, vector: tuple[float, ...]) -> None:
        wanted = Selection(scope, environment, self._version(scope, back))
        self.both(lambda store: store.find_nearest(wanted, vector, 3))

    @rule(
        scope=st.sampled_from(SCOPES),
        environment=st.sampled_from(ENVIRONMENTS),
        back=_back,
        text=st.lists(st.sampled_from(_WORDS), min_size=1, max_size=2).map(" ".join),
        limit=st.integers(1, 3),
    )
    def find_words(self, scope: str, environment: str, back: int | None, text: str, limit: int) -> None:
        """Of all statuses: the statistics of the words are then those of the same texts in both."""
        wanted = Selection(scope, environment, self._version(scope, back), statuses=ALL)
        self.both(lambda store: store.find_words(wanted, text, limit))

    def _version(self, scope: str, back: int | None) -> int | None:
        newest = self.run(self.notes.snapshot(scope)).version
        return None if back is None else max(newest - back, 0)

    @rule(scope=st.sampled_from([*SCOPES, ""]), size=st.integers(1, 3), deleted=st.booleans())
    def pages(self, scope: str, size: int, deleted: bool) -> None:
        self.both(lambda store: _all_pages(lambda at: store.list(scope, at, size, deleted), "reflections"))
        self.both(lambda store: _all_pages(lambda at: store.changes(scope, at, size), "changes"))

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def read_one(self, data: st.DataObject) -> None:
        identity = self.some_id(data)
        self.both(lambda store: store.get(identity))
        self.both(lambda store: store.uses_of(identity, 3))
        self.both(lambda store: store.derived_from(identity))

    @rule()
    def open_again(self) -> None:
        self.run(self.store.close())
        self.store = self._open()

    @invariant()
    def see_the_newest(self) -> None:
        for scope in SCOPES:
            newest = self.both(lambda store, scope=scope: store.snapshot(scope))  # type: ignore[misc]
            assert newest is not None
            for environment in ENVIRONMENTS:
                if (scope, environment, newest.version) not in self.seen:
                    wanted = Selection(scope, environment, statuses=ALL)
                    found = self.both(lambda store, wanted=wanted: store.find(wanted, Order.UPLIFT, 99))  # type: ignore[misc]
                    self.seen[scope, environment, newest.version] = found

    def _read_all_versions_again(self) -> None:
        for (scope, environment, version), found in self.seen.items():
            wanted = Selection(scope, environment, version, statuses=ALL)
            again = self.both(lambda store, wanted=wanted: store.find(wanted, Order.UPLIFT, 99))  # type: ignore[misc]
            assert again in (found, None), "only an erasure makes a version unreadable"


async def _answer(call: Coroutine[Any, Any, T]) -> Any:
    """The answer without its times; of a refusal what a caller sees."""
    try:
        return _timeless(await call)
    except DomainError as error:
        return ("refused", error.reason, {name: error.metadata.get(name) for name in ("version", "revision", "use_id")})


def _timeless(value: Any) -> Any:
    if isinstance(value, StoredReflection):
        return replace(value, created_at=_EPOCH)
    if isinstance(value, RecordedUse):
        return replace(value, drawn_at=_EPOCH)
    if isinstance(value, MemoryChange):
        return replace(value, changed_at=_EPOCH)
    if isinstance(value, Found):
        return replace(value, reflections=tuple(map(_timeless, value.reflections)))
    return list(map(_timeless, value)) if isinstance(value, list | tuple) and not isinstance(value, Added) else value


async def _all_pages(page: Callable[[int], Coroutine[Any, Any, Any]], items: str) -> list[Any]:
    found: list[Any] = []
    position: int | None = 0
    while position is not None:
        answer = await page(position)
        found += getattr(answer, items)
        position = answer.next_position
    return found


def random_calls(open_in: Callable[[Path], Awaitable[Store]], count: int = 15) -> type[TestCase]:
    """A test case of `count` sequences of random calls to the store that `open_in` opens in a folder."""
    machine = type("StoreMachine", (_Calls,), {"open_in": staticmethod(open_in)})
    case: type[TestCase] = machine.TestCase  # type: ignore[attr-defined]
    case.settings = settings(  # type: ignore[attr-defined]
        max_examples=examples(count), stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow]
    )
    return case
