"""What was asked of a memory and what it answered, and what must hold of its store after a crash.

The writers (`memory_writers.py`) note a call before they make it and its answer after it, in this order. So at any
moment a call without an answer may have been carried out or not, and one with an answer was carried out.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import (
    MemoryChange,
    Provenance,
    ReflectionStatus,
    StoredReflection,
)
from mulligan.memory.store import Order, Selection, Store, reflection_id
from mulligan.memory.stores import sqlite
from mulligan.testing.faulty_play import BrokenPromise

ORIGIN = Provenance("run", "experience", "lake", "train/00001", 3, 0.0, 1.0, True)
CONFLICT = "conflict"  # the answer to a revision that was refused
_ALL = frozenset(ReflectionStatus)
_PAGE = 500
_FOLLOWING = ("quarantine", "activate", "recover")  # in the log: what a report changed, in its version
_SEARCHED = 5  # entries
_READ_AGAIN = 30  # reads, at most

Call = dict[str, Any]


class Ledger:
    """Calls, by number, and answers. A call has `do` (add, revise, draw, report, delete, erase, read), its scope, and
    what it needs to be made again."""

    def __init__(self, file: Path | None = None) -> None:
        self.calls: list[Call] = []
        self.answers: dict[int, Any] = {}
        self._file = None if file is None else file.open("ab", buffering=0)

    @classmethod
    def read(cls, lines: Iterable[bytes]) -> Ledger:
        ledger = cls()
        for line in lines:
            noted = json.loads(line)
            if "call" in noted:
                ledger.calls.append(noted["call"])
            else:
                ledger.answers[noted["number"]] = noted["answer"]
        return ledger

    def ask(self, **call: Any) -> int:
        """The call's number."""
        self._note({"call": call})
        self.calls.append(call)
        return len(self.calls) - 1

    def answer(self, number: int, answer: Any) -> None:
        self._note({"number": number, "answer": answer})
        self.answers[number] = answer

    def of(self, do: str, scope: str) -> Iterator[tuple[Call, Any]]:
        """Calls of this kind, each with its answer, None where it has none."""
        for number, call in enumerate(self.calls):
            if (call["do"], call["scope"]) == (do, scope):
                yield call, self.answers.get(number)

    @property
    def answered(self) -> Counter[str]:
        """How many calls of each kind were answered."""
        return Counter(self.calls[number]["do"] for number in self.answers)

    @property
    def open(self) -> list[int]:
        return [number for number in range(len(self.calls)) if number not in self.answers]

    @property
    def scopes(self) -> list[str]:
        return sorted({call["scope"] for call in self.calls})

    def _note(self, line: dict[str, Any]) -> None:
        """One call of the system for each line: so the order of all lines and of the service's writes is known."""
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")


def promise(kept: bool, broken: str) -> None:
    if not kept:
        raise BrokenPromise(broken)


async def check_sqlite(path: Path, ledger: Ledger) -> Counter[str]:
    """Opens the database as a service does at its start, and checks it. Returns what `check` does."""
    store = await sqlite.open(str(path), sqlite.Settings())
    try:
        _check_files(path, await _erased_words(store, ledger))
        found = await check(store, ledger)
    finally:
        await store.close()
    database = sqlite3.connect(path)
    try:
        said = database.execute("PRAGMA integrity_check").fetchall()
    finally:
        database.close()
    promise(said == [("ok",)], f"the database is damaged: {said}")
    return found


async def _erased_words(store: Store, ledger: Ledger) -> list[bytes]:
    """A word of each erased entry, which no other text has."""
    entries = [one for scope in ledger.scopes for one in await _entries(store, scope)]
    erased = {one.reflection_id for one in entries if one.erased_version is not None}
    adds = (call for scope in ledger.scopes for call, _ in ledger.of("add", scope))
    return [call["word"].encode() for call in adds if reflection_id(call["scope"], call["request"]) in erased]


def _check_files(path: Path, erased: Sequence[bytes]) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        content = file.read_bytes()
        left = [word for word in erased if word in content]
        promise(not left, f"{file.name} has the texts of {len(left)} erased entries, as {left[:1]}")


async def check(store: Store, ledger: Ledger) -> Counter[str]:
    """How many entries, versions, uses and so on were there. Raises BrokenPromise."""
    found: Counter[str] = Counter()
    for scope in ledger.scopes:
        entries = {one.reflection_id: one for one in await _entries(store, scope)}
        changes = await _all_pages(lambda at, scope=scope: store.changes(scope, at, _PAGE), "changes")  # type: ignore[misc]
        await _check_versions(store, scope, entries, changes)
        logged = Counter((change.action, change.reflection_id) for change in changes)
        _check_added(ledger, scope, entries, logged)
        _check_revised(ledger, scope, entries, logged)
        _check_gone(ledger, scope, entries, logged)
        found["uses"] += await _check_uses(store, ledger, scope, entries, logged)
        found["reads"] += await _check_reads(store, ledger, scope, entries)
        found["entries"] += len(entries)
        found["versions"] += (await store.snapshot(scope)).version
    return found


async def _entries(store: Store, scope: str) -> list[StoredReflection]:
    return await _all_pages(lambda at: store.list(scope, at, _PAGE, True), "reflections")


async def _all_pages(page: Callable[[int], Awaitable[Any]], items: str) -> list[Any]:
    found: list[Any] = []
    position: int | None = 0
    while position is not None:
        answer = await page(position)
        found += getattr(answer, items)
        position = answer.next_position
    return found


async def _check_versions(
    store: Store, scope: str, entries: dict[str, StoredReflection], changes: Sequence[MemoryChange]
) -> None:
    """Each version was made by one write; all parts of the store agree on what there is."""
    snapshot = await store.snapshot(scope)
    made = [change.version for change in changes if change.action not in _FOLLOWING]
    promise(made == list(range(1, snapshot.version + 1)), f"{scope}: versions {made[-5:]} of {snapshot.version}")
    followed = {change.version for change in changes if change.action in _FOLLOWING}
    reports = {change.version for change in changes if change.action == "report"}
    promise(followed <= reports, f"{scope}: statuses changed without a report at {sorted(followed - reports)[:5]}")
    kept = [one for one in entries.values() if one.deleted_version is None]
    promise(
        len(kept) == snapshot.reflection_count, f"{scope}: {len(kept)} entries, {snapshot.reflection_count} counted"
    )
    selection = Selection(scope, ORIGIN.environment, statuses=_ALL)
    found = (await store.find(selection, Order.NEWEST, len(entries) + 1)).reflections
    promise(list(found) == kept[::-1], f"{scope}: a query finds {len(found)} of {len(kept)} entries, or others")
    for one in kept[-_SEARCHED:]:
        found = (await store.find_words(selection, one.text, 1)).reflections
        promise(list(found) == [one], f"{scope}: {one.reflection_id} is not found by its words")


def _check_added(
    ledger: Ledger, scope: str, entries: dict[str, StoredReflection], logged: Counter[tuple[str, str]]
) -> None:
    """What was acknowledged is there, and all that is there is whole."""
    asked = {reflection_id(scope, call["request"]): (call, answer) for call, answer in ledger.of("add", scope)}
    promise(entries.keys() <= asked.keys(), f"{scope}: entries that nobody added")
    for identity, (call, answer) in asked.items():
        stored = entries.get(identity)
        promise(answer is None or (answer == identity and stored is not None), f"{scope}: {identity} is lost")
        promise(logged["add", identity] == (stored is not None), f"{scope}: {identity} in the log and not, or twice")
        if stored is None:
            continue
        text = "" if stored.erased_version else call["text"]
        same = stored.text.split(" ")[0] == text if call["kind"] == "document" else stored.text == text
        promise(same and stored.kind == call["kind"], f"{scope}: {identity} has the text {stored.text!r}")
        promise(stored.provenance == ORIGIN, f"{scope}: {identity} has another origin")
        promise(list(stored.source_ids) == call["sources"], f"{scope}: {identity} has lost its sources")


def _check_revised(
    ledger: Ledger, scope: str, entries: dict[str, StoredReflection], logged: Counter[tuple[str, str]]
) -> None:
    """Each revision added a word. All that were acknowledged are in the text once, in the order of the revisions."""
    words = {identity: one.text.split(" ") for identity, one in entries.items() if one.kind == "document"}
    asked: dict[str, set[str]] = {identity: set() for identity in words}
    for call, answer in ledger.of("revise", scope):
        word, of = call["word"], words[call["id"]]
        asked[call["id"]].add(word)
        if answer == CONFLICT:
            promise(word not in of, f"{scope}: the refused revision {word} was made")
        elif answer is not None:
            promise(of[answer - 1 : answer] == [word], f"{scope}: revision {answer} of {call['id']}, {word}, is lost")
    for identity, of in words.items():
        promise(len(set(of)) == len(of), f"{scope}: a word of {identity} is there twice")
        promise(set(of[1:]) <= asked[identity], f"{scope}: {identity} has words that nobody added")
        revised = logged["revise", identity]
        promise(entries[identity].revision == len(of) == revised + 1, f"{scope}: revisions of {identity}, of the log")


def _check_gone(
    ledger: Ledger, scope: str, entries: dict[str, StoredReflection], logged: Counter[tuple[str, str]]
) -> None:
    """What was deleted or erased stays so; nothing else is."""
    asked: dict[str, set[str]] = {"delete": set(), "erase": set()}
    for do, identities in asked.items():
        for call, answer in ledger.of(do, scope):
            identities.add(call["id"])
            gone = getattr(entries[call["id"]], f"{do}d_version")
            promise(answer is None or gone is not None, f"{scope}: {call['id']} is back after {do}")
    for identity, one in entries.items():
        if one.erased_version is not None:
            promise(identity in asked["erase"] and not one.text, f"{scope}: {identity} is erased")
            promise(one.deleted_version is not None, f"{scope}: {identity} is erased and not deleted")
        elif one.deleted_version is not None:
            promise(identity in asked["delete"], f"{scope}: {identity} is deleted")
        promise(logged["erase", identity] == (one.erased_version is not None), f"{scope}: erasure of {identity} in log")


async def _check_uses(
    store: Store,
    ledger: Ledger,
    scope: str,
    entries: dict[str, StoredReflection],
    logged: Counter[tuple[str, str]],
) -> int:
    """A use is recorded for all its entries, a report counted as a whole and once. Returns the rewarded uses."""
    draws = [answer for _, answer in ledger.of("draw", scope) if answer is not None]
    drawn = dict.fromkeys(identity for answer in draws for identity in answer["entries"])
    recorded = {identity: {one.use_id: one for one in await store.uses_of(identity, 10**6)} for identity in drawn}
    rewards: dict[str, float] = {}
    shown: dict[str, list[float]] = {identity: [] for identity in entries}
    left_out: dict[str, list[float]] = {identity: [] for identity in entries}
    for answer in draws:
        for use_id, left_out_id in answer["uses"]:
            there = [recorded[identity].get(use_id) for identity in answer["entries"]]
            promise(None not in there, f"{scope}: use {use_id} is lost")
            got = {one.reward for one in there if one is not None}
            promise(len(got) == 1, f"{scope}: use {use_id} has the rewards {got}")
            reward = got.pop()
            if reward is None:
                continue
            rewards[use_id] = reward
            for identity in answer["entries"]:
                if left_out_id in ("", identity):
                    (left_out if left_out_id else shown)[identity].append(reward)
    counted = 0
    for call, answer in ledger.of("report", scope):
        got_all = {rewards.get(use_id) for use_id, _ in call["outcomes"]} - {None}
        every = all(rewards.get(use_id) == reward for use_id, reward in call["outcomes"])
        promise(every or (not got_all and answer is None), f"{scope}: a report is lost, or half of it")
        counted += every and call["first"]
    promise(logged["report", ""] == counted, f"{scope}: {logged['report', '']} reports in the log, {counted} counted")
    for identity, entry in entries.items():
        uplift = entry.uplift
        count = (uplift.uses_shown, uplift.uses_left_out) if uplift else (0, 0)
        expected = (len(shown[identity]), len(left_out[identity]))
        promise(count == expected, f"{scope}: the evidence of {identity} has {count} uses, not {expected}")
        if uplift is not None:
            sums = (uplift.mean_shown * count[0], uplift.mean_left_out * count[1])
            close = all(
                abs(a - sum(b)) < 1e-6 for a, b in zip(sums, (shown[identity], left_out[identity]), strict=True)
            )
            promise(close, f"{scope}: the evidence of {identity} has other rewards")
    return len(rewards)


async def _check_reads(store: Store, ledger: Ledger, scope: str, entries: dict[str, StoredReflection]) -> int:
    """A version is read as it was read before. Returns how many reads were repeated."""
    erased = {identity for identity, one in entries.items() if one.erased_version is not None}
    repeated = 0
    for call, answer in list(ledger.of("read", scope))[-_READ_AGAIN:]:
        if answer is None:
            continue
        selection = Selection(scope, ORIGIN.environment, call["version"], successes_only=True)
        try:
            found = await store.find(selection, Order.NEWEST, call["limit"])
        except DomainError as error:
            promise(error.reason is Reason.SNAPSHOT_REDACTED and bool(erased), f"{scope}: {error}")
            continue
        seen = [[one.reflection_id, one.text, one.revision] for one in found.reflections]
        promise(seen == answer["seen"], f"{scope}: version {call['version']} is another one now")
        repeated += 1
    return repeated
