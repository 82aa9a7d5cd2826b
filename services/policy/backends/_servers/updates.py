"""New weights for all servers of a pool."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

import structlog

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature
from mulligan.policy.backend import Admission, WeightsFile
from mulligan.policy.backends._servers.connection import RequestRefused, Unreachable
from mulligan.policy.backends._servers.folders import Folders, TargetWeights
from mulligan.policy.backends._servers.pool import ServerPool
from mulligan.policy.backends._servers.server import EngineServer

log = structlog.get_logger()


class Updates:
    """Gives new weights to the servers of one pool. Either all serve them, or all load the old ones again.

    `policy/replicas.py` does the same with policy servers, and says why the two share no code.
    """

    def __init__(self, pool: ServerPool, folders: Folders):
        self._pool = pool
        self._folders = folders

    async def update(self, weights: WeightsFile, admit: Admission) -> None:
        """As `Backend.update_weights`. A server that fails meanwhile is taken out, and the others go on."""
        pool = self._pool
        target = await asyncio.to_thread(self._folders.prepare, weights)
        try:
            async with pool.changing:
                if pool.released:
                    raise DomainError(Reason.ENGINE_UNAVAILABLE, "the servers' memory is released")
                await self._exchange(target, admit)
        finally:
            if pool.target is not target:
                await asyncio.to_thread(self._folders.remove, target)

    async def _exchange(self, target: TargetWeights, admit: Admission) -> None:
        pool = self._pool
        before = self._pool.target
        serving = [server for server in pool.servers if server.serving]
        if not serving:
            raise pool.unavailable()
        async with AsyncExitStack() as stack:
            # A running request on an adapter cannot go on over another base, nor one on the base below an adapter.
            rebase = not target.adapter or any(server.label != target.label for server in serving)
            if rebase and (before.adapter or target.adapter):
                await stack.enter_async_context(pool.drained())
            pool.know(target)
            refused = await (self._load_all(serving, target) if rebase else self._load_adapters(serving, target))
            if refused:
                await self._put_back(serving, before, rebase=rebase)
                raise DomainError(Reason.MODEL_MISMATCH, f"{pool.engine} refuses the weights: {refused}")
            if not any(server.held is target for server in serving):
                raise pool.unavailable()
            pool.target = target
            pool.admit = admit
        for server in serving:
            await self._admit(server, target, admit)
        if not any(server.serving for server in serving):
            pool.target = before
            pool.know(before)
            raise pool.unavailable()
        pool.run(self._retire(before))

    async def _admit(self, server: EngineServer, target: TargetWeights, admit: Admission) -> None:
        if server.held is not target:  # it died
            return
        try:
            await admit(server, target.weights)
        except DomainError as error:
            if error.reason is not Reason.ENGINE_UNAVAILABLE:
                raise
            self._pool.take_out(server, error.message)

    async def _load_all(self, servers: Sequence[EngineServer], target: TargetWeights) -> str:
        """Returns why a server refused; empty if none did."""
        live = await self._each(servers, lambda server: server.pause())
        refused: list[str] = []

        async def load(server: EngineServer) -> None:
            try:
                await server.load_base(target)
            except RequestRefused as error:
                refused.append(str(error))

        live = await self._each(live, load)
        if refused:
            return refused[0]
        live = await self._each(live, lambda server: server.go_on())
        return await self._load_adapters(live, target)

    async def _load_adapters(self, servers: Sequence[EngineServer], target: TargetWeights) -> str:
        refused: list[str] = []

        async def load(server: EngineServer) -> None:
            try:
                if Feature.LORA_WEIGHTS in server.features:
                    await server.load_adapters(target)
                server.held = target
            except RequestRefused as error:
                refused.append(str(error))

        await self._each(servers, load)
        return refused[0] if refused else ""

    async def _put_back(self, servers: Sequence[EngineServer], before: TargetWeights, *, rebase: bool) -> None:
        """Loads what was there before. A failed load may have left a part of the new weights behind."""
        self._pool.know(before)

        async def put_back(server: EngineServer) -> None:
            if rebase:
                await self._pool.load(server, before)
            else:
                server.held = before
            await server.unload_others(before)

        await self._each(servers, put_back)

    async def _each(
        self, servers: Sequence[EngineServer], work: Callable[[EngineServer], Awaitable[None]]
    ) -> list[EngineServer]:
        """Does the work for all servers at once. Returns those that still serve; the others are taken out."""

        async def one(server: EngineServer) -> bool:
            if not server.serving:
                return False
            try:
                await work(server)
            except (Unreachable, RequestRefused) as error:
                self._pool.take_out(server, str(error))
                return False
            return True

        alive = await asyncio.gather(*(one(server) for server in servers))
        return [server for server, lives in zip(servers, alive, strict=True) if lives]

    async def _retire(self, target: TargetWeights) -> None:
        """Unloads an adapter after its last request, and removes the files."""
        await self._pool.finished(target)
        async with self._pool.changing:
            if target is self._pool.target:
                return
            if target.adapter:
                await self._each(self._pool.servers, lambda server: server.unload(target.adapter))
            await asyncio.to_thread(self._folders.remove, target)

    async def release_memory(self) -> None:
        """Releases the memory of all servers that serve. No request may run."""
        async with self._pool.changing:
            if not await self._each(self._pool.servers, lambda server: server.release_memory()):
                raise self._pool.unavailable()
            self._pool.released = True

    async def resume_memory(self) -> None:
        """Takes the memory again and loads the weights, since released memory is empty."""
        pool = self._pool

        async def resume(server: EngineServer) -> None:
            await server.resume_memory()
            await pool.load(server, pool.target)

        async with pool.changing:
            pool.released = False
            if not await self._each(pool.servers, resume):
                raise pool.unavailable()
