"""The load process for OpenEnv: `python -m benchmarks.openenv.load URL`, in OpenEnv's environment.

Its own asynchronous client, a WebSocket per session, as its documentation says. The connection stays open from one
episode to the next.
"""

from __future__ import annotations

import asyncio
import sys

from openenv.core import GenericEnvClient

from benchmarks.env.sessions import answer


class OpenEnvSession:
    def __init__(self, client: GenericEnvClient):
        self._client = client

    async def begin(self, task_id: str) -> None:
        await self._client.reset(task_id=task_id)

    async def step(self, action: str) -> None:
        await self._client.step({"text": action})

    async def end(self) -> None:
        """The next reset does it."""

    async def close(self) -> None:
        await self._client.close()


async def main(url: str) -> None:
    async def open_session() -> OpenEnvSession:
        client = GenericEnvClient(base_url=url)
        await client.connect()
        return OpenEnvSession(client)

    await answer(open_session)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
