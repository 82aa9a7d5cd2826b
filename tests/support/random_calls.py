"""Calls of a store in a random order, whose answers are compared with those of `acme.notes`, which keeps a copy of all
entries for each version."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest import TestCase

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mulligan.common.errors import DomainError
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
from tests.support.stores import (
    ALL,
    ENVIRONMENTS,
    SCOPES,
    GivenVectors,
)

T = TypeVar("T")

_EPOCH = datetime.fromtimestamp(0, UTC)
_VECTORS = [(1.0, 0.0, 0.0, 0.0), (0.0, 0.0, -1.0, 0.0), (0.5, 0.5, 0.5, 0.5), (0.5, -0.5, 0.5, -0.5)]  # exact products
_WORDS = ("ice", "hole", "left", "goal")

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
