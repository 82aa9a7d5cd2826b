"""The embeddings of texts and of callers, as unit vectors. Texts are embedded in a thread; those that wait at the same
time share a call."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.memory.embedder import CannotEmbed, Embedder

Vector = tuple[float, ...]
_TOGETHER = 64  # texts of one call


class Vectors:
    def __init__(self, embedder: Embedder | None) -> None:
        self._embedder = embedder
        self._waiting: list[tuple[str, asyncio.Future[Vector]]] = []
        self._working: asyncio.Task[None] | None = None

    async def of(self, text: str, given: Sequence[float]) -> Vector:
        """The unit vector of `given`, or else of the text; empty without an embedder, and for a text in which there is
        nothing to embed. Raises INVALID_FIELD, which names `embedding`."""
        if given:
            return self.unit(given)
        return () if self._embedder is None else await self._embed(text)

    def require(self) -> None:
        """Raises NO_EMBEDDER."""
        if self._embedder is None:
            raise DomainError(Reason.NO_EMBEDDER, "SIMILAR_MEANING needs an embedder, and this server has none")

    def unit(self, given: Sequence[float]) -> Vector:
        """Raises INVALID_FIELD, which names `embedding`."""
        size = 0 if self._embedder is None else self._embedder.size
        if not size:
            raise invalid_field("embedding", "none: this server has no embedder")
        if len(given) != size:
            raise invalid_field("embedding", f"{size} numbers, not {len(given)}")
        for place, value in enumerate(given):
            if not math.isfinite(value):
                raise invalid_field(f"embedding[{place}]", f"a finite number, not {value}")
        length = math.hypot(*given)
        if not length:
            raise invalid_field("embedding", "a number that is not 0 among them")
        return tuple(value / length for value in given)

    async def _embed(self, text: str) -> Vector:
        future: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        try:
            return await future
        except CannotEmbed as error:
            raise invalid_field("embedding", str(error)) from error

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_TOGETHER], self._waiting[_TOGETHER:]
            futures = [future for _, future in batch]
            try:
                found = await asyncio.to_thread(self._vectors, [text for text, _ in batch])
            except Exception as error:  # noqa: BLE001 - an embedder may raise anything; the calls answer it
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, vector in zip(futures, found, strict=True):
                if not future.done():  # a call that was given up
                    future.set_result(vector)
        self._working = None

    def _vectors(self, texts: Sequence[str]) -> list[Vector]:
        assert self._embedder is not None
        found = self._embedder.embed(texts)
        if found.shape != (len(texts), self._embedder.size):
            raise ValueError(f"embedder {self._embedder.name}: {found.shape} numbers for {len(texts)} texts")
        vectors = []
        for row in found.tolist():
            length = math.hypot(*row)
            if not math.isfinite(length):
                raise ValueError(f"embedder {self._embedder.name}: a number that is not finite")
            vectors.append(tuple(value / length for value in row) if length else ())
        return vectors
