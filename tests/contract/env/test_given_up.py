"""Episodes whose player is cancelled before it has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from mulligan.common.channel import Endpoint
from mulligan.common.server import RequestInterceptor
from mulligan.env import servicer
from mulligan.env.client import EnvClient
from mulligan.env.episodes import EpisodeTable
from mulligan.env.workers import WorkerPool
from tests.support.waiting import until
from tests.unit.env.test_episode_memory import Echo


async def test_an_episode_that_is_given_up_while_it_starts_takes_no_place() -> None:
    """Whenever that is: before the server knows of it, while it starts, and when the answer is under way."""
    echo = Echo(0.002)
    workers = WorkerPool(size=2, limit_seconds=60.0, max_abandoned=2)
    table = EpisodeTable({"echo": echo}, workers)
    server = grpc.aio.server(interceptors=[RequestInterceptor()])
    servicer.add_to_server(server, table)
    client = EnvClient(Endpoint(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", outage_seconds=5))
    await server.start()
    source = await client.start("echo", "t", "source")
    await source.step("a")
    begun = 0
    begin: list[Callable[[int], Coroutine[Any, Any, Any]]] = [
        lambda number: client.start("echo", "t", f"e{number}"),
        lambda number: client.fork("source", 1, f"f{number}"),
    ]
    for number in range(30):
        task = asyncio.create_task(begin[number % 2](number))
        await asyncio.sleep(0.0004 * number)
        if task.cancel():
            await asyncio.wait([task])
        if not task.cancelled():
            begun += 1
            await task.result().end()
        assert table.live_count == 1, "only the source"
    assert begun < 30
    await source.end()
    await until(lambda: not echo.open)
    await client.close()
    await server.stop(None)
    workers.close()
