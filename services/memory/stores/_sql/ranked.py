"""Searches by words and by meaning: indexes in memory order the entries, and the tables say which of them are selected.

An index belongs to a scope. It is made from the rows at the first search, and each search first reads what was written
since the last one, so it serves also where other processes write to the same database.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
import structlog

from mulligan.memory.dense import DenseIndex
from mulligan.memory.store import Found, Selection
from mulligan.memory.stores._sql import queries
from mulligan.memory.stores._sql.queries import Row
from mulligan.memory.stores._sql.sums import Section, damage_of
from mulligan.memory.stores._sql.tables import reflections, texts
from mulligan.memory.words import WordIndex

_TEXT = Section(texts)

_log = structlog.get_logger()
_LOGGED_AFTER = 2.0  # seconds
_BATCH = 2_000  # rows
_MAX_BYTES = 2**31  # of all indexes; those that were used least recently are dropped, but for the one in use


class Indexes:
    """Of all scopes. Searches of several threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], WordIndex | DenseIndex] = OrderedDict()

    def forget(self) -> None:
        """After a transaction that failed an index may have what was never written."""
        with self._lock:
            self._kept.clear()

    def find_words(self, db: sa.Connection, selection: Selection, text: str, limit: int) -> Found:
        scope, version = queries.at_version(db, selection)
        if scope is None:
            return Found((), version)
        with self._lock:
            index = self._kept.setdefault(("words", scope.id), WordIndex())
            assert isinstance(index, WordIndex)
            _catch_up(db, index, scope, texts.c.text)
            self._used("words", scope.id)
            blocks = index.best(version, selection.environment, text, 2 * limit)
            return _selected(db, selection, scope, version, blocks, limit)

    def find_nearest(
        self, db: sa.Connection, selection: Selection, embedding: Sequence[float], limit: int, embedder: str
    ) -> Found:
        scope, version = queries.at_version(db, selection)
        if scope is None:
            return Found((), version)
        with self._lock:
            index = self._kept.setdefault(("dense", scope.id), DenseIndex())
            assert isinstance(index, DenseIndex)
            _catch_up(db, index, scope, texts.c.embedding, texts.c.embedder == embedder)
            self._used("dense", scope.id)
            blocks = index.nearest(version, selection.environment, embedding, 2 * limit)
            return _selected(db, selection, scope, version, blocks, limit)

    def _used(self, kind: str, scope_id: int) -> None:
        self._kept.move_to_end((kind, scope_id))
        while len(self._kept) > 1 and sum(index.bytes for index in self._kept.values()) > _MAX_BYTES:
            self._kept.popitem(last=False)


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


def _catch_up(db: sa.Connection, index: WordIndex | DenseIndex, scope: Row, content: Any, *conditions: Any) -> None:
    """Reads the texts that were added and closed since the index's version, but for damaged ones."""
    since = index.texts.version
    if since >= scope.version:
        return
    in_scope = texts.c.scope_id == scope.id
    closed = sa.select(texts.c.id, texts.c.until_version).where(in_scope, texts.c.until_version > since)
    if since:
        for text_id, version in db.execute(closed):
            index.texts.close(text_id, version)
        erased = sa.select(reflections.c.position, reflections.c.deleted_version).where(
            reflections.c.scope_id == scope.id, reflections.c.erased_version > since
        )
        for position, version in db.execute(erased):
            index.texts.close_entry(position, version)
    opened = (
        sa.select(*_TEXT.columns, texts.c.id, reflections.c.environment, content.label("content"))
        .join(reflections, reflections.c.position == texts.c.position)
        .where(in_scope, texts.c.from_version > since, *conditions)
        .order_by(texts.c.from_version)
    )
    for row in _told(db, opened, scope):
        if not _TEXT.is_sound(row):
            damage_of(db).tell(f"text {row.id}", "its checksum differs: searches leave it out")
            continue
        try:
            index.add(row.id, row.position, row.environment, row.from_version, row.until_version, row.content)
        except ValueError as error:
            damage_of(db).tell(f"the embedding of text {row.id}", f"{error}: searches leave it out")
    index.texts.version = scope.version


def _told(db: sa.Connection, opened: sa.Select[Any], scope: Row) -> Iterator[Row]:
    """The rows. If they take long, the log says how far it is."""
    began = told = time.monotonic()
    read = 0
    for rows in db.execute(opened.execution_options(yield_per=_BATCH)).partitions():
        yield from rows
        read += len(rows)
        if time.monotonic() - told > _LOGGED_AFTER:
            told = time.monotonic()
            _log.info("reading texts for searches", scope=scope.name, texts=read, entries=scope.entries)
    if told > began:
        _log.info("texts for searches are read", texts=read, seconds=round(time.monotonic() - began, 1))
