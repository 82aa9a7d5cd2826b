"""A TCP proxy that behaves as networks do on bad days, from a seed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

from mulligan.common.tasks import cancel


@dataclass(frozen=True, slots=True)
class Faults:
    """`cut_after`: how long a connection lasts, in seconds, from and to. Half of them end at once; on the other half
    answers are lost from then on, and requests still arrive, until it ends `drop_seconds` later. `delayed` is the share
    of chunks that are held back for up to `delay_seconds`."""

    cut_after: tuple[float, float] = (0.05, 0.6)
    drop_seconds: float = 0.1
    delayed: float = 0.05
    delay_seconds: float = 0.03


@dataclass
class FaultyProxy:
    """`faults` counts what happened. `target` is looked up for each connection."""

    target: str
    faults: Faults
    chance: random.Random
    happened: Counter[str] = field(default_factory=Counter)
    address: str = ""
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await cancel(*self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._forward(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        their_reader, their_writer = await asyncio.open_connection(host, int(port))
        dropping = asyncio.Event()
        pumps = [
            asyncio.create_task(self._pump(reader, their_writer, None)),
            asyncio.create_task(self._pump(their_reader, writer, dropping)),
        ]
        try:
            lasts = self.chance.uniform(*self.faults.cut_after)
            done, _ = await asyncio.wait(pumps, timeout=lasts, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return
            if self.chance.random() < 0.5:
                self.happened["answers_dropped"] += 1
                dropping.set()
                await asyncio.wait(pumps, timeout=self.faults.drop_seconds, return_when=asyncio.FIRST_COMPLETED)
            self.happened["connections_cut"] += 1
        finally:
            await cancel(*pumps)
            their_writer.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dropping: asyncio.Event | None
    ) -> None:
        while chunk := await reader.read(2**16):
            if self.chance.random() < self.faults.delayed:
                self.happened["delays"] += 1
                await asyncio.sleep(self.chance.uniform(0, self.faults.delay_seconds))
            if dropping is not None and dropping.is_set():
                continue
            writer.write(chunk)
            await writer.drain()
