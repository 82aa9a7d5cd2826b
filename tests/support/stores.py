"""What every store of the memory service passes. A store's test module has a subclass of `StoreChecks`, and a test case
of random calls, `random_calls.random_calls(...)`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import (
    MAX_TEXT_BYTES,
    Labels,
    MixPart,
    Provenance,
    ReflectionKind,
    ReflectionQuery,
    ReflectionStatus,
    RetrievalStrategy,
    UseOutcome,
)
from mulligan.memory.retrieval import retrieve
from mulligan.memory.store import (
    ANSWER_BYTES,
    RETRIEVED,
    DrawnUse,
    Found,
    NewReflection,
    Order,
    Rewriting,
    Selection,
    Store,
    use_id,
)

T = TypeVar("T")
Open = Callable[[], Awaitable[Store]]  # opens the same database each time

ORIGIN = Provenance("run", "experience", "lake", "train/00001", 3, 0.0, 1.0, True)
SCOPES = ("run-1", "run-2")
ENVIRONMENTS = ("lake", "maze")
ALL = frozenset(ReflectionStatus)


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

    async def test_a_repeated_revision_is_the_first_answer_and_another_change_is_refused(self, store: Store) -> None:
        identity = (await store.add(new("a", "begin", kind=ReflectionKind.DOCUMENT))).reflection_id
        rewriting = Rewriting(identity, "r", 1, text="one", key="k", tags=("t",))
        first = await store.revise(rewriting)
        assert await store.revise(rewriting) == await store.revise(Rewriting(identity, "r", 7)) == first
        for other in ({"text": "two"}, {"key": "l"}, {"tags": ()}):
            await refused(store.revise(replace(rewriting, **other)), Reason.REQUEST_CONFLICT)
        await store.revise(Rewriting(identity, "s", 2, tags=()))
        await refused(store.revise(rewriting), Reason.REVISION_CONFLICT)
        assert (await store.get(identity)).text == "one" and (await store.snapshot("scope")).version == 3

    async def test_who_deletes_or_erases_may_name_the_revision_that_it_saw(self, store: Store) -> None:
        identity = (await store.add(new("a", "one", kind=ReflectionKind.DOCUMENT))).reflection_id
        await store.revise(Rewriting(identity, "r", 1, text="two"))
        for call in (store.delete, store.erase):
            for expected in (1, 3):
                error = await refused(call(identity, "", expected), Reason.REVISION_CONFLICT)
                assert int(error.metadata["revision"]) == 2
        assert (await store.snapshot("scope")).version == 2
        assert await store.delete(identity, "", 2) == await store.delete(identity, "", 1) == 3
        assert await store.erase(identity, "", 2) == await store.erase(identity) == 4

    async def test_an_answer_is_never_larger_than_a_message(self, store: Store) -> None:
        """Neither a page nor what a query finds, however large the texts are and however many are asked for."""
        large = "word " * (MAX_TEXT_BYTES // 5)
        for number in range(35):
            await store.add(new(f"{number}", f"{number} {large}"[:MAX_TEXT_BYTES]))
        page = await store.list("scope", 0, 1000, False)
        assert page.next_position is not None and len(page.reflections) == ANSWER_BYTES // MAX_TEXT_BYTES == 32
        rest = await store.list("scope", page.next_position, 1000, False)
        assert len(rest.reflections) == 3 and rest.next_position is None
        query = ReflectionQuery("scope", ORIGIN.environment, RetrievalStrategy.LATEST_SUCCESS, 100)
        assert len((await retrieve(query, store)).reflections) == 32

    async def test_the_best_entries_that_fit_are_found(self, store: Store) -> None:
        for number in range(6):
            await store.add(new(f"{number}", f"{number} " + "long " * 100 if number % 2 else f"short {number}"))
        latest = ReflectionQuery("scope", ORIGIN.environment, RetrievalStrategy.LATEST_SUCCESS, 2, max_tokens=20)
        mix = replace(latest, strategy=RetrievalStrategy.MIX, mix=(MixPart(RetrievalStrategy.LATEST_SUCCESS, 2),))
        for query in (latest, mix):
            found = await retrieve(query, store)
            assert [one.text for one in found.reflections] == ["short 4", "short 2"]

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
        assert await store.scopes_of_uses([one.use_id for one in drawn] + ["none"]) == ["scope"]
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
