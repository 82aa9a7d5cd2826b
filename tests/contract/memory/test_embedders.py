"""A database and the embedder of its service, which may change between two starts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import Provenance, ReflectionQuery, RetrievalStrategy
from mulligan.memory.client import MemoryClient
from mulligan.testing.processes import ProcessFailed, ServiceProcesses

ORIGIN = Provenance("run", "experience", "lake", "train/00001", 3, 0.0, 1.0, True)
T = TypeVar("T")


@pytest.mark.long
def test_texts_are_embedded_anew_where_the_embedder_is_another(
    services: ServiceProcesses, acme: dict[str, str], tmp_path: Path
) -> None:
    def served(what: Callable[[MemoryClient], Awaitable[T]], **settings: Any) -> T:
        server = services.start("memory", environment=acme, database=f"sqlite:{tmp_path / 'memory.db'}", **settings)

        async def main() -> T:
            client = MemoryClient(Endpoint(server.address))
            try:
                return await what(client)
            finally:
                await client.close()

        try:
            return asyncio.run(main())
        finally:
            server.stop()

    async def add(client: MemoryClient) -> None:
        for text in ("aaa dog", "zz puppy", "coin"):
            await client.add(text, "scope", text, ORIGIN)

    async def nearest(client: MemoryClient) -> str:
        query = ReflectionQuery("scope", "lake", RetrievalStrategy.SIMILAR_MEANING, 1, text="zzzzz")
        return (await client.query(query)).reflections[0].text

    served(add)
    assert served(nearest, embedder="letters") == "zz puppy", "what was written without an embedder"
    assert served(nearest, embedder="letters", **{"letters.alphabet": "za"}) == "zz puppy"
    with pytest.raises(DomainError) as caught:
        served(nearest)
    assert caught.value.reason is Reason.NO_EMBEDDER
    with pytest.raises(ProcessFailed, match=r"embedder: the database's entries need other embeddings \(26 numbers"):
        served(nearest, embedder="given", **{"given.size": 26})
    assert served(nearest, embedder="letters") == "zz puppy", "the refused start changed nothing"
