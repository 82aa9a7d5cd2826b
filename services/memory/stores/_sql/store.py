"""A `Store` on a SQL database, but for how its calls get a connection."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import sqlalchemy as sa
import structlog

from mulligan.common.errors import DomainError
from mulligan.common.reflections import RecordedUse, StoredReflection, UseOutcome
from mulligan.memory.embedder import Embedder
from mulligan.memory.store import (
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
)
from mulligan.memory.stores._sql import outcomes as uses
from mulligan.memory.stores._sql import queries, writes
from mulligan.memory.stores._sql.embeddings import embed_some
from mulligan.memory.stores._sql.ranked import BATCH, Indexes

R = TypeVar("R")

_log = structlog.get_logger()
_LOGGED_AFTER = 2.0  # seconds


class SqlStore(ABC):
    """Methods run on the event loop; what they pass to `_read` and `_write` runs on other threads."""

    def __init__(self) -> None:
        self._indexes = Indexes()
        self._embedder: str | None = None

    @abstractmethod
    async def _read(self, call: Callable[[sa.Connection], R], *, one_state: bool = True) -> R:
        """Runs the call in a transaction that sees one state of the database. Without `one_state` each statement may
        see another one."""

    @abstractmethod
    async def _write(self, call: Callable[[sa.Connection], R]) -> R:
        """The same; returns when what the call wrote is durable."""

    @abstractmethod
    async def _clean(self) -> None:
        """Removes erased bytes from the files, if there are some."""

    @abstractmethod
    async def close(self) -> None: ...

    async def add(self, new: NewReflection) -> Added:
        return await self._write(lambda db: writes.add(db, new, self._embedder))

    async def add_all(self, news: Sequence[NewReflection]) -> Sequence[Added | DomainError]:
        return await self._write(lambda db: [self._added(db, new) for new in news])

    def _added(self, db: sa.Connection, new: NewReflection) -> Added | DomainError:
        """The error of one is not that of others: what is wrong is found before anything is written."""
        try:
            return writes.add(db, new, self._embedder)
        except DomainError as error:
            return error

    async def find(self, selection: Selection, order: Order, limit: int) -> Found:
        return await self._read(lambda db: queries.find(db, selection, order, limit), one_state=False)

    async def find_words(self, selection: Selection, text: str, limit: int) -> Found:
        return await self._search(selection, lambda db: self._indexes.find_words(db, selection, text, limit))

    async def find_nearest(self, selection: Selection, embedding: Sequence[float], limit: int) -> Found:
        embedder = self._embedder
        if embedder is None:  # the embeddings are not used
            return await self.find(selection, Order.NEWEST, 0)
        return await self._search(
            selection, lambda db: self._indexes.find_nearest(db, selection, embedding, limit, embedder)
        )

    async def _search(self, selection: Selection, find: Callable[[sa.Connection], Found | None]) -> Found:
        """Goes on until the index has all texts; other calls go on meanwhile, and the log tells how far it is. A search
        that is given up leaves to the next one what it has read."""
        began = told = time.monotonic()
        parts = 0
        while (found := await self._read(find)) is None:
            parts += 1
            if time.monotonic() - told > _LOGGED_AFTER:
                told = time.monotonic()
                _log.info("reading texts for searches", scope=selection.scope, texts=parts * BATCH)
        if told > began:
            _log.info("texts for searches are read", seconds=round(time.monotonic() - began, 1))
        return found

    async def get(self, reflection_id: str) -> StoredReflection:
        return await self._read(lambda db: queries.get(db, reflection_id))

    async def list(self, scope: str, position: int, limit: int, include_deleted: bool) -> Page:
        return await self._read(lambda db: queries.page(db, scope, position, limit, include_deleted))

    async def revise(self, rewriting: Rewriting) -> Revised:
        return await self._write(lambda db: writes.revise(db, rewriting, self._embedder))

    async def delete(self, reflection_id: str, actor: str = "", expected_revision: int = 0) -> int:
        return await self._write(lambda db: writes.delete(db, reflection_id, actor, expected_revision))

    async def erase(self, reflection_id: str, actor: str = "", expected_revision: int = 0) -> int:
        version = await self._write(lambda db: writes.erase(db, reflection_id, actor, expected_revision))
        await self._clean()
        await self._read(lambda db: self._indexes.erase(db, reflection_id))
        return version

    async def record_uses(self, drawn: Sequence[DrawnUse]) -> None:
        await self._write(lambda db: uses.record_uses(db, drawn))

    async def report(self, outcomes: Sequence[UseOutcome], actor: str = "") -> int:
        return await self._write(lambda db: uses.report(db, outcomes, actor))

    async def scopes_of_uses(self, use_ids: Sequence[str]) -> Sequence[str]:
        return await self._read(lambda db: uses.scopes_of_uses(db, use_ids))

    async def uses_of(self, reflection_id: str, limit: int) -> Sequence[RecordedUse]:
        return await self._read(lambda db: uses.uses_of(db, reflection_id, limit))

    async def derived_from(self, reflection_id: str) -> Sequence[str]:
        return await self._read(lambda db: queries.derived_from(db, reflection_id))

    async def changes(self, scope: str, position: int, limit: int) -> ChangePage:
        return await self._read(lambda db: queries.change_page(db, scope, position, limit))

    async def snapshot(self, scope: str) -> Snapshot:
        return await self._read(lambda db: queries.snapshot(db, scope))

    async def use_embedder(self, embedder: Embedder | None) -> None:
        if embedder is None:
            return
        told = time.monotonic()
        done: int | None = 0
        while done is not None:
            done = await self._write(partial(embed_some, embedder=embedder, after=done))
            if time.monotonic() - told > _LOGGED_AFTER:
                told = time.monotonic()
                _log.info("embedding the texts anew", embedder=embedder.name, last_text=done)
        self._embedder = embedder.name


@contextmanager
def plain_errors() -> Iterator[None]:
    """The database's own exception instead of SQLAlchemy's, which quotes the statement."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise error.orig or error from None
