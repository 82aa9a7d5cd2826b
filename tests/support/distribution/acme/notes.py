"""A store that keeps reflections in memory, and loses them with its process. It is what other stores are compared with:
it keeps a copy of all entries for each version of a scope."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate
from operator import mul
from typing import Any

from pydantic import Field

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import (
    MemoryChange,
    RecordedUse,
    ReflectionKind,
    ReflectionStatus,
    StoredReflection,
    UseOutcome,
)
from mulligan.memory.embedder import Embedder
from mulligan.memory.evidence import Evidence
from mulligan.memory.store import (
    ANSWER_BYTES,
    Added,
    ChangePage,
    DrawnUse,
    Found,
    NewReflection,
    Order,
    Page,
    Revised,
    Rewriting,
    Selection,
    Snapshot,
    StoreError,
    StoreSettings,
    action_of,
    evidence_in,
    first_status,
    reflection_id,
    rewritten_status,
    status_after,
    uplift_of,
)

_QUARANTINED_COUNTS = 8


class Settings(StoreSettings):
    """A notebook."""

    pages: int = Field(1_000_000, ge=1, description="Reflections that it has room for.")


@dataclass
class Note:
    """An entry, beside what its `StoredReflection` says."""

    scope: str
    first: NewReflection | None  # what was added; None once it is erased
    embeddings: dict[int, Sequence[float]]  # by revision
    written: list[int]  # versions that wrote its text, also where it was known
    evidence: Evidence = field(default_factory=Evidence)
    evidence_since: int = 1  # revision
    revised_by: tuple[str, Revised] | None = None  # the newest revision: request id, answer


@dataclass
class NotedUse:
    drawn: DrawnUse
    at: datetime
    reward: float | None = None


class Notes:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._notes: dict[str, Note] = {}  # by id, in the order in which they were added
        self._states: dict[str, list[dict[str, StoredReflection]]] = {}  # scope → version → the entries, by id
        self._uses: dict[str, NotedUse] = {}
        self._changes: list[MemoryChange] = []
        self._embedder = ""  # whose the embeddings are, by its name
        # Calls that stored nothing, because their text was known: the id that was their answer, and what they asked
        # for, which is None once that entry is erased.
        self._answered: dict[str, tuple[str, NewReflection | None]] = {}

    async def add(self, new: NewReflection) -> Added:
        identity = reflection_id(new.scope, new.request_id)
        if note := self._notes.get(identity):
            return self._again(identity, note.first, new)
        if identity in self._answered:
            return self._again(*self._answered[identity], new)
        for source in new.labels.source_ids:
            if source not in self._newest(new.scope):
                raise _unknown(source)
        if new.unless_known and (known := self._having(new)):
            self._answered[identity] = (known, new)
            self._notes[known].written.append(self._write(new.scope, "repeat", known, new.actor))
            return Added(known, self._now(known).version)
        if len(self._notes) >= self._settings.pages:
            full = f"all {self._settings.pages} pages are full"
            raise DomainError(Reason.DISK_FULL, full, folder="notes", free_bytes=0, needed_bytes=0)
        version = self._write(new.scope, "add", identity, new.actor)
        labels = new.labels
        stored = StoredReflection(
            *(identity, new.scope, new.text, new.provenance, version, datetime.now(UTC)),
            kind=labels.kind,
            key=labels.key,
            tags=labels.tags,
            source_ids=labels.source_ids,
            status=first_status(labels),
        )
        self._notes[identity] = Note(new.scope, new, {1: new.embedding}, [version])
        self._newest(new.scope)[identity] = stored
        return Added(identity, version)

    def _again(self, identity: str, first: NewReflection | None, new: NewReflection) -> Added:
        known = first or new
        if (known.text, known.provenance, known.labels) != (new.text, new.provenance, new.labels):
            raise DomainError(Reason.REQUEST_CONFLICT, f"request {new.request_id!r} stored another reflection")
        return Added(identity, self._now(identity).version)

    def _having(self, new: NewReflection) -> str | None:
        """The id of the oldest entry that has the text."""
        wanted = (new.provenance.environment, new.labels.kind, new.text)
        for one in self._newest(new.scope).values():
            if one.deleted_version is None and (one.provenance.environment, one.kind, one.text) == wanted:
                return one.reflection_id
        return None

    async def find(self, selection: Selection, order: Order, limit: int) -> Found:
        if order is not Order.UPLIFT:
            return self._best(selection, limit, lambda one: _rank(one, order))
        version = len(self._versions(selection.scope)) - 1 if selection.version is None else selection.version

        def proved(one: StoredReflection) -> tuple[float, int]:
            written = self._notes[one.reflection_id].written
            return one.uplift.lower if one.uplift else -1.0, max(past for past in written if past <= version)

        return self._best(selection, limit, proved)

    async def find_words(self, selection: Selection, text: str, limit: int) -> Found:
        found = self._selected(selection)
        scores = _bm25([one.text for one in found], text)
        by_id = {one.reflection_id: score for one, score in zip(found, scores, strict=True)}
        return self._best(selection, limit, lambda one: by_id[one.reflection_id] or None)

    async def find_nearest(self, selection: Selection, embedding: Sequence[float], limit: int) -> Found:
        def cosine(one: StoredReflection) -> float | None:
            own = self._notes[one.reflection_id].embeddings[one.revision]
            return sum(map(mul, own, embedding)) if len(own) else None

        return self._best(selection, limit, cosine)

    async def get(self, reflection_id: str) -> StoredReflection:
        return self._now(reflection_id)

    async def list(self, scope: str, position: int, limit: int, include_deleted: bool) -> Page:
        stored = map(self._now, self._notes)
        page, following = _page(
            *(stored, position, limit),
            lambda one: scope in ("", one.scope) and (include_deleted or one.deleted_version is None),
        )
        fitting = _fitting(page)
        return Page(fitting, following if len(fitting) == len(page) else self._place(fitting[-1]))

    def _place(self, entry: StoredReflection) -> int:
        """From 1."""
        return tuple(self._notes).index(entry.reflection_id) + 1

    async def revise(self, rewriting: Rewriting) -> Revised:
        old = self._now(rewriting.reflection_id)
        note = self._notes[old.reflection_id]
        if old.deleted_version is not None:
            raise _unknown(old.reflection_id)
        if note.revised_by is not None and note.revised_by[0] == rewriting.request_id:
            again = (rewriting.text, rewriting.key, rewriting.tags)
            if any(new not in (None, known) for known, new in zip((old.text, old.key, old.tags), again, strict=True)):
                raise DomainError(Reason.REQUEST_CONFLICT, f"{rewriting.request_id!r} rewrote it in another way")
            return note.revised_by[1]
        if rewriting.text is not None and old.kind is ReflectionKind.EPISODE:
            raise DomainError(Reason.RAW_ENTRY, f"{old.reflection_id!r} is an episode")
        _check_revision(old, rewriting.expected_revision)
        names = [name for name in ("text", "key", "tags", "status") if getattr(rewriting, name) is not None]
        given: dict[str, Any] = {name: getattr(rewriting, name) for name in names}
        new = replace(old, revision=old.revision + 1, **given)
        if rewriting.text is not None:
            note.embeddings[new.revision] = rewriting.embedding
        else:
            note.embeddings[new.revision] = note.embeddings[old.revision]
        if new.text != old.text:
            new = replace(new, status=rewritten_status(new.status))
        if new.text != old.text or rewriting.status is ReflectionStatus.CANDIDATE:
            note.evidence, note.evidence_since = Evidence(), new.revision
        new = replace(new, uplift=uplift_of(note.evidence))
        version = self._write(old.scope, "revise", old.reflection_id, rewriting.actor, ", ".join(names))
        if new.text != old.text:
            note.written.append(version)
        self._newest(old.scope)[old.reflection_id] = new
        revised = Revised(new.revision, version)
        note.revised_by = (rewriting.request_id, revised)
        return revised

    async def delete(self, reflection_id: str, actor: str = "", expected_revision: int = 0) -> int:
        old = self._now(reflection_id)
        if old.deleted_version is not None:
            return old.deleted_version
        _check_revision(old, expected_revision or old.revision)
        version = self._write(old.scope, "delete", reflection_id, actor)
        self._newest(old.scope)[reflection_id] = replace(old, deleted_version=version)
        return version

    async def erase(self, reflection_id: str, actor: str = "", expected_revision: int = 0) -> int:
        old = self._now(reflection_id)
        if old.erased_version is not None:
            return old.erased_version
        _check_revision(old, expected_revision or old.revision)
        version = self._write(old.scope, "erase", reflection_id, actor)
        deleted = version if old.deleted_version is None else old.deleted_version
        self._newest(old.scope)[reflection_id] = replace(old, erased_version=version, deleted_version=deleted)
        for state in self._states[old.scope]:
            if reflection_id in state:
                state[reflection_id] = replace(state[reflection_id], text="", key="", tags=())
        note = self._notes[reflection_id]
        note.first = None
        note.embeddings = dict.fromkeys(note.embeddings, ())
        for request, (answer, _) in self._answered.items():
            if answer == reflection_id:
                self._answered[request] = (answer, None)
        return version

    async def record_uses(self, uses: Sequence[DrawnUse]) -> None:
        for use in uses:
            known = self._uses[use.use_id].drawn if use.use_id in self._uses else use
            if (known.entries, known.left_out_id) != (use.entries, use.left_out_id):
                raise DomainError(Reason.REQUEST_CONFLICT, f"use {use.use_key!r} was drawn for other entries")
        for use in uses:
            self._uses.setdefault(use.use_id, NotedUse(use, datetime.now(UTC)))

    async def scopes_of_uses(self, use_ids: Sequence[str]) -> Sequence[str]:
        return sorted({self._uses[one].drawn.scope for one in use_ids if one in self._uses})

    async def report(self, outcomes: Sequence[UseOutcome], actor: str = "") -> int:
        for outcome in outcomes:
            if outcome.use_id not in self._uses:
                raise DomainError(Reason.UNKNOWN_USE, f"no use {outcome.use_id!r} here", use_id=outcome.use_id)
        counted: dict[str, list[NotedUse]] = {}  # by scope
        for outcome in outcomes:
            use = self._uses[outcome.use_id]
            if use.reward is None:
                use.reward = outcome.reward
                counted.setdefault(use.drawn.scope, []).append(use)
        for scope, uses in counted.items():
            self._write(scope, "report", "", actor, f"{len(uses)} uses")
            self._learn(scope, uses, actor)
        return sum(map(len, counted.values()))

    async def uses_of(self, reflection_id: str, limit: int) -> Sequence[RecordedUse]:
        self._now(reflection_id)
        found = [
            RecordedUse(
                use_id=use.drawn.use_id,
                use_key=use.drawn.use_key,
                shown=use.drawn.left_out_id != reflection_id,
                revision=revision,
                holdout=use.drawn.holdout,
                reward=use.reward,
                drawn_at=use.at,
            )
            for use in reversed(self._uses.values())
            for identity, revision in use.drawn.entries
            if identity == reflection_id
        ]
        return found[:limit]

    async def derived_from(self, reflection_id: str) -> Sequence[str]:
        return tuple(identity for identity in self._notes if reflection_id in self._now(identity).source_ids)

    async def changes(self, scope: str, position: int, limit: int) -> ChangePage:
        return ChangePage(*_page(self._changes, position, limit, lambda change: scope in ("", change.scope)))

    async def snapshot(self, scope: str) -> Snapshot:
        kept = [one for one in self._newest(scope).values() if one.deleted_version is None]
        return Snapshot(len(self._versions(scope)) - 1, len(kept))

    async def use_embedder(self, embedder: Embedder | None) -> None:
        """Notes that lie there, without embeddings or with another embedder's, are embedded anew."""
        if embedder is None or embedder.name == self._embedder:
            return
        texts = {
            (one.reflection_id, one.revision): one.text
            for states in self._states.values()
            for state in states
            for one in state.values()
            if one.text  # none is left of what was erased
        }
        rows = embedder.embed(list(texts.values())) if texts else ()
        for (identity, revision), row in zip(texts, rows, strict=True):
            self._notes[identity].embeddings[revision] = [float(number) for number in row]
        self._embedder = embedder.name

    async def close(self) -> None:
        return None

    def _versions(self, scope: str) -> Sequence[dict[str, StoredReflection]]:
        return self._states.get(scope, [{}])

    def _newest(self, scope: str) -> dict[str, StoredReflection]:
        return self._versions(scope)[-1]

    def _now(self, reflection_id: str) -> StoredReflection:
        if reflection_id not in self._notes:
            raise _unknown(reflection_id)
        return self._newest(self._notes[reflection_id].scope)[reflection_id]

    def _write(self, scope: str, action: str, reflection_id: str, actor: str, detail: str = "") -> int:
        """Begins a new version, as a copy of the newest."""
        states = self._states.setdefault(scope, [{}])
        states.append(dict(states[-1]))
        version = len(states) - 1
        change = MemoryChange(scope, version, action, reflection_id, actor, datetime.now(UTC), detail)
        self._changes.append(change)
        return version

    def _learn(self, scope: str, uses: Sequence[NotedUse], actor: str) -> None:
        changed: dict[str, None] = {}
        for use in uses:
            for identity, revision, shown, p_out in evidence_in(use.drawn):
                note = self._notes[identity]
                if revision >= note.evidence_since and use.reward is not None:
                    note.evidence.add(use.reward, shown=shown, p_out=p_out)
                    changed[identity] = None
        state = self._newest(scope)
        for identity in changed:
            old, evidence = state[identity], self._notes[identity].evidence
            status = status_after(old.status, helpful=evidence.helpful, harmful=evidence.harmful)
            state[identity] = replace(old, uplift=uplift_of(evidence), status=status)
            if status is not old.status:
                version = len(self._versions(scope)) - 1
                change = MemoryChange(scope, version, action_of(status), identity, actor, datetime.now(UTC))
                self._changes.append(change)

    def _selected(self, selection: Selection) -> Sequence[StoredReflection]:
        states = self._versions(selection.scope)
        newest = len(states) - 1
        version = newest if selection.version is None else selection.version
        if version > newest:
            raise DomainError(Reason.UNKNOWN_VERSION, f"{selection.scope!r} is at version {newest}", version=newest)
        if self._redacted(states[version]):
            readable = next(number for number in range(version, newest + 1) if not self._redacted(states[number]))
            raise DomainError(Reason.SNAPSHOT_REDACTED, f"version {version} had an erased entry", version=readable)
        return [one for one in states[version].values() if _selects(selection, one)]

    def _redacted(self, state: dict[str, StoredReflection]) -> bool:
        """Whether an entry was there that has been erased since."""
        return any(
            one.deleted_version is None and self._now(one.reflection_id).erased_version is not None
            for one in state.values()
        )

    def _best(self, selection: Selection, limit: int, rank: Callable[[StoredReflection], Any]) -> Found:
        """Those with the greatest rank, among equals the latest; without those whose rank is None."""
        ranked = [(value, one) for one in self._selected(selection) if (value := rank(one)) is not None]
        ranked.sort(key=lambda pair: (pair[0], pair[1].version), reverse=True)
        newest = len(self._versions(selection.scope)) - 1
        version = newest if selection.version is None else selection.version
        return Found(tuple(one for _, one in ranked[:limit]), version)


async def open(location: str, settings: Settings) -> Notes:
    if location != "desk":
        raise StoreError(f"database: notes lie on the desk, not at {location!r}")
    return Notes(settings)


def _unknown(reflection_id: str) -> DomainError:
    return DomainError(Reason.UNKNOWN_REFLECTION, f"no reflection {reflection_id!r} here")


def _selects(selection: Selection, one: StoredReflection) -> bool:
    origin = one.provenance
    return (
        one.deleted_version is None
        and origin.environment == selection.environment
        and (origin.success or not selection.successes_only)
        and one.status in selection.statuses
        and (not selection.kinds or one.kind in selection.kinds)
        and (not selection.key or one.key == selection.key)
        and set(selection.tags) <= set(one.tags)
        and origin.task_id.startswith(selection.task_prefix)
    )


def _rank(one: StoredReflection, order: Order) -> float:
    """The greatest comes first."""
    uplift = one.uplift
    if order is Order.GAIN:
        return one.provenance.reward_after - one.provenance.reward_before
    if order is Order.FEWEST_USES:
        uses = 0 if uplift is None else uplift.uses_shown + uplift.uses_left_out
        return -uses * (_QUARANTINED_COUNTS if one.status is ReflectionStatus.QUARANTINED else 1)
    return 0.0


def _bm25(texts: Sequence[str], query: str, k1: float = 1.2, b: float = 0.75) -> list[float]:
    """How well each text fits the query; 0 without a common word. Robertson and Zaragoza, The Probabilistic Relevance
    Framework: BM25 and Beyond (2009), 3.15, with an inverse document frequency that is never negative."""
    counts = [Counter(_words(text)) for text in texts]
    lengths = [count.total() for count in counts]
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    scores = [0.0] * len(texts)
    for word in set(_words(query)):
        having = sum(word in count for count in counts)
        rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        for place, count in enumerate(counts):
            if often := count[word]:
                scores[place] += rarity * often * (k1 + 1) / (often + k1 * (1 - b + b * lengths[place] / mean))
    return scores


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _fitting(page: Sequence[StoredReflection]) -> tuple[StoredReflection, ...]:
    """As many of the first ones as an answer has room for, and at least one, if there is one."""
    sizes = accumulate(len(one.text.encode()) for one in page)
    return tuple(
        one for place, (one, size) in enumerate(zip(page, sizes, strict=True)) if not place or size <= ANSWER_BYTES
    )


def _page(items: Any, position: int, limit: int, wanted: Callable[[Any], bool]) -> tuple[tuple[Any, ...], int | None]:
    """At most `limit` wanted items after `position`, and the position of the last if there are more."""
    found = [(place, item) for place, item in enumerate(items, 1) if place > position and wanted(item)]
    page = found[:limit]
    return tuple(item for _, item in page), page[-1][0] if len(found) > limit else None


def _check_revision(old: StoredReflection, expected: int) -> None:
    if expected != old.revision:
        message = f"{old.reflection_id!r} is at revision {old.revision}"
        raise DomainError(Reason.REVISION_CONFLICT, message, revision=old.revision)
