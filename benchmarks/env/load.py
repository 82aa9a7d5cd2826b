"""The load process for mulligan: `python -m benchmarks.env.load ADDRESS`. All sessions share one ordinary client."""

from __future__ import annotations

import asyncio
import itertools
import sys

from benchmarks.env.sessions import answer
from mulligan.common.channel import Endpoint
from mulligan.env.client import EnvClient, RemoteEpisode

ENVIRONMENT = "frozenlake"
_ids = itertools.count()


class OurSession:
    """Plays one episode after another. Sessions do not know of each other."""

    def __init__(self, client: EnvClient):
        self._client = client
        self._episode: RemoteEpisode | None = None

    async def begin(self, task_id: str) -> None:
        self._episode = await self._client.start(ENVIRONMENT, task_id, f"session-{next(_ids)}")

    async def step(self, action: str) -> None:
        assert self._episode is not None
        await self._episode.step(action)

    async def end(self) -> None:
        assert self._episode is not None
        await self._episode.end()

    async def close(self) -> None:
        """Nothing is left open."""


async def main(address: str) -> None:
    client = EnvClient(Endpoint(address))

    async def open_session() -> OurSession:
        return OurSession(client)

    await answer(open_session)
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
