"""Searches by words and by meaning: indexes in memory order the entries, and the tables say which of them are selected.

An index belongs to a scope. It is made from the rows at the first search, and each search first reads what was written
since the last one, so it serves also where other processes write to the same database.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import sqlalchemy as sa

from mulligan.memory.dense import DenseIndex
from mulligan.memory.store import Found, Selection
from mulligan.memory.stores._sql import queries
from mulligan.memory.stores._sql.queries import Row
from mulligan.memory.stores._sql.sums import Section, damage_of
from mulligan.memory.stores._sql.tables import reflections, texts
from mulligan.memory.words import WordIndex

_TEXT = Section(texts)

BATCH = 2_000  # texts
_MAX_BYTES = 2**31  # of all indexes; those that were used least recently are dropped, but for the one in use


class Kind(StrEnum):
    WORDS = "words"
    MEANING = "meaning"


@dataclass(frozen=True, eq=False)
class _Kept:
    index: WordIndex | DenseIndex
    lock: threading.Lock = field(default_factory=threading.Lock)


class Indexes:
    """Of all scopes. Searches of several threads take turns at an index."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the dictionary
        self._kept: OrderedDict[tuple[Kind, int], _Kept] = OrderedDict()

    def forget(self) -> None:
        """After a transaction that failed an index may have what was never written."""
        with self._lock:
            self._kept.clear()

    def erase(self, db: sa.Connection, reflection_id: str) -> None:
        """What the indexes have of an erased entry is gone. (Those of other servers do it before their next search.)"""
        known = sa.select(reflections.c.scope_id, reflections.c.position, reflections.c.deleted_version)
        for scope_id, position, version in db.execute(known.where(reflections.c.reflection_id == reflection_id)):
            with self._lock:
                of_scope = [kept for (_, indexed), kept in self._kept.items() if indexed == scope_id]
            for kept in of_scope:
                with kept.lock:
                    kept.index.erase(position, version)

    def find_words(self, db: sa.Connection, selection: Selection, text: str, limit: int) -> Found | None:
        """The first entries. None where it has read some of the texts that were written since the last search, but not
        all: other calls can take their turn before it goes on."""
        scope, version = queries.at_version(db, selection)
        if scope is None:
            return Found((), version)
        with self._using(Kind.WORDS, scope.id) as index:
            assert isinstance(index, WordIndex)
            if not _catch_up(db, index, scope, ""):
                return None
            blocks = index.best(version, selection.environment, text, 2 * limit)
            return _selected(db, selection, scope, version, blocks, limit)

    def find_nearest(
        self, db: sa.Connection, selection: Selection, embedding: Sequence[float], limit: int, embedder: str
    ) -> Found | None:
        """The same."""
        scope, version = queries.at_version(db, selection)
        if scope is None:
            return Found((), version)
        with self._using(Kind.MEANING, scope.id) as index:
            assert isinstance(index, DenseIndex)
            if not _catch_up(db, index, scope, embedder):
                return None
            blocks = index.nearest(version, selection.environment, embedding, 2 * limit)
            return _selected(db, selection, scope, version, blocks, limit)

    @contextmanager
    def _using(self, kind: Kind, scope_id: int) -> Iterator[WordIndex | DenseIndex]:
        """The index, made if there is none. Those that were used least recently go where all take too much memory."""
        key = (kind, scope_id)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _Kept(WordIndex() if kind is Kind.WORDS else DenseIndex())
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(one.index.bytes for one in self._kept.values()) > _MAX_BYTES:
                self._kept.popitem(last=False)
            kept = self._kept[key]
        with kept.lock:
            yield kept.index


def _selected(
    db: sa.Connection, selection: Selection, scope: Row, version: int, blocks: Iterable[Sequence[int]], limit: int
) -> Found:
    """The first entries of the blocks that the tables select."""
    found: list[Row] = []
    for positions in blocks:
        states = queries.states_of(db, selection, scope, version, positions)
        found += [states[position] for position in positions if position in states]
        if len(found) >= limit:  # asked before the next block is computed
            break
    return Found(queries.as_then(db, found[:limit]), version)


def _catch_up(db: sa.Connection, index: WordIndex | DenseIndex, scope: Row, embedder: str) -> bool:
    """Reads about the first BATCH of the texts that were added since the index's version, and those that were closed,
    but for damaged ones. Returns whether the index has read them all."""
    _close(db, index, scope)
    since, until = index.texts.version, scope.version
    if since >= until:
        return True
    conditions = [texts.c.scope_id == scope.id, texts.c.from_version > since]
    versions = sa.select(texts.c.from_version).where(*conditions).order_by(texts.c.from_version)
    until = db.execute(versions.offset(BATCH - 1).limit(1)).scalar() or until
    conditions.append(texts.c.from_version <= until)
    is_words = isinstance(index, WordIndex)
    content = texts.c.text if is_words else texts.c.embedding
    opened = (
        sa.select(*_TEXT.columns, texts.c.id, reflections.c.environment, content.label("content"))
        .join(reflections, reflections.c.position == texts.c.position)
        .where(*conditions, *([] if is_words else [texts.c.embedder == embedder]))
        .order_by(texts.c.from_version)
    )
    for row in db.execute(opened.execution_options(yield_per=BATCH)):
        if not _TEXT.is_sound(row):
            damage_of(db).tell(f"text {row.id}", "its checksum differs: searches leave it out")
            continue
        try:
            index.add(row.id, row.position, row.environment, row.from_version, row.until_version, row.content)
        except ValueError as error:
            damage_of(db).tell(f"the embedding of text {row.id}", f"{error}: searches leave it out")
    index.texts.version = until
    return bool(until >= scope.version)


def _close(db: sa.Connection, index: WordIndex | DenseIndex, scope: Row) -> None:
    """Closes the index's texts that were rewritten or deleted since it did so last, and removes what was erased."""
    since = index.texts.closed
    if index.texts.size and since < scope.version:
        in_scope = texts.c.scope_id == scope.id
        closed = sa.select(texts.c.id, texts.c.until_version).where(in_scope, texts.c.until_version > since)
        for text_id, version in db.execute(closed):
            index.texts.close(text_id, version)
        erased = sa.select(reflections.c.position, reflections.c.deleted_version).where(
            reflections.c.scope_id == scope.id, reflections.c.erased_version > since
        )
        for position, version in db.execute(erased):
            index.erase(position, version)
    index.texts.closed = scope.version
