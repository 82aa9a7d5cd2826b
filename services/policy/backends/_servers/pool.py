"""The servers of one policy: which one gets a request, which are taken out, and how those come back."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import structlog
from cachetools import LRUCache

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, VersionSpan
from mulligan.common.tasks import Broadcast, cancel
from mulligan.policy.backend import Admission
from mulligan.policy.backends._servers.connection import RequestRefused, Unreachable
from mulligan.policy.backends._servers.folders import TargetWeights
from mulligan.policy.backends._servers.server import EngineServer, Unsuitable

log = structlog.get_logger()
_MISSED_PROBES = 3  # that a busy server may leave unanswered
_RETRY_AFTER = timedelta(seconds=1)
_KEPT_PLACES = 65536  # conversations whose server is remembered
_PREFIX = 256  # tokens by which prompts without a session are kept together
_SLACK = 8  # requests that a conversation's server may have above one and a half times the least


class Stale(Exception):
    """An answer came from weights that the server was never given, or should no longer hold."""


class ServerPool:
    """`look` finds out what a server is, and raises Unsuitable. `target` is what all servers must hold. Whoever changes
    it, or what servers hold, holds the lock `changing`. Once `admit` is set, it checks each server before it serves.
    """

    def __init__(
        self,
        servers: Sequence[EngineServer],
        target: TargetWeights,
        look: Callable[[EngineServer], Coroutine[Any, Any, None]],
        *,
        probe_seconds: float,
        wait_seconds: float,
    ):
        self.servers = servers
        self.target = target
        self.admit: Admission | None = None
        self.changing = asyncio.Lock()
        self.released = False
        self._look = look
        self._probe_seconds = probe_seconds
        self._wait_seconds = wait_seconds
        self._versions: dict[str, tuple[int, int]] = {}  # of each label: policy version, generation
        self._places: LRUCache[object, EngineServer] = LRUCache(_KEPT_PLACES)
        self._changed = Broadcast()
        self._held_back = False
        self._restoring: set[EngineServer] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.know(target)

    @property
    def engine(self) -> str:
        return self.servers[0].engine

    def start(self) -> None:
        for server in self.servers:
            self.run(self._probe(server))

    async def close(self) -> None:
        await cancel(*self._tasks)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def know(self, target: TargetWeights) -> None:
        """Accepts answers with the label of `target` from now on, also to requests that were sent before."""
        target.generation = 1 + max((generation for _, generation in self._versions.values()), default=0)
        if target.adapter:  # its base is what the model came with, from whichever update
            version, _ = self._versions[target.label]
        else:
            version = target.weights.policy_version
        self._versions[target.label] = (version, target.generation)

    def spans(self, target: TargetWeights, labels: Sequence[tuple[str, int]], *, own: bool) -> tuple[VersionSpan, ...]:
        """Turns the servers' labels of weights into policy versions, for a request that was sent while `target` was to
        be served. With `own` the request used the target's adapter. Raises Stale."""
        found: list[VersionSpan] = []
        for label, count in labels:
            version, generation = self._versions.get(label, (0, -1))
            if own and target.adapter:
                if label != target.label:
                    raise Stale(f"an adapter was used over the weights {label!r} instead of {target.label!r}")
                version = target.weights.policy_version
            elif generation < target.generation:
                raise Stale(f"an answer came from weights {label!r} instead of {target.label!r}")
            if found and found[-1].policy_version == version:
                found[-1] = VersionSpan(version, found[-1].token_count + count)
            else:
                found.append(VersionSpan(version, count))
        return tuple(found)

    # Requests

    @asynccontextmanager
    async def dispatch(self, key: object) -> AsyncIterator[tuple[EngineServer, TargetWeights]]:
        """Yields a server for one request, and the weights that must answer it. Waits for a server for up to
        `wait_seconds`.

        Raises DomainError ENGINE_UNAVAILABLE.
        """
        server = await self._choose(key)
        target = self.target
        server.in_flight += 1
        target.running += 1
        try:
            yield server, target
        finally:
            server.in_flight -= 1
            target.running -= 1
            if target.running == 0:
                self._changed.wake_all()

    async def _choose(self, key: object) -> EngineServer:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_seconds
        while (held := self._held_back) or not (serving := [server for server in self.servers if server.serving]):
            try:
                async with asyncio.timeout_at(None if held else deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise self.unavailable() from None
            if held:  # while weights are exchanged, which does not count as waiting for a server
                deadline = loop.time() + self._wait_seconds
        least = min(server.in_flight for server in serving)
        place = self._places.get(key)
        if place is None or not place.serving or place.in_flight > 1.5 * least + _SLACK:
            place = min(serving, key=lambda server: server.in_flight)
            self._places[key] = place
        return place

    def unavailable(self) -> DomainError:
        problems = "; ".join(f"{server.address}: {server.problem}" for server in self.servers if not server.serving)
        return DomainError(
            Reason.ENGINE_UNAVAILABLE, f"no {self.engine} server serves: {problems}", retry_after=_RETRY_AFTER
        )

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Inside, no request runs, and new ones wait."""
        self._held_back = True
        try:
            while any(server.in_flight for server in self.servers):
                await self._changed.wait()
            yield
        finally:
            self._held_back = False
            self._changed.wake_all()

    async def finished(self, target: TargetWeights) -> None:
        """Returns when all requests that were sent for this target have ended."""
        while target.running:
            await self._changed.wait()

    # Health

    def take_out(self, server: EngineServer, problem: str, times_let_in: int | None = None) -> None:
        """Sends the server no requests until it answers again, holds the target and is admitted. A problem of a request
        that was sent before the server was last let in, by `times_let_in`, is ignored."""
        if times_let_in not in (None, server.times_let_in):
            return
        if server.serving:
            log.warning("server taken out", server=server.address, problem=problem)
        server.serving = False
        server.problem = problem
        server.held = None
        self._changed.wake_all()
        if server not in self._restoring:
            self._restoring.add(server)
            self.run(self._restore(server))

    def let_in(self, server: EngineServer) -> None:
        log.info("server serves", server=server.address, policy_version=self.target.weights.policy_version)
        server.serving = True
        server.problem = ""
        server.times_let_in += 1
        self._changed.wake_all()

    async def load(self, server: EngineServer, target: TargetWeights, *, checked: bool = True) -> None:
        """Makes the server hold `target`, whatever it holds now. Raises Unreachable, RequestRefused."""
        await server.pause()
        await server.load_base(target, checked=checked)
        await server.go_on()
        if Feature.LORA_WEIGHTS in server.features:
            await server.load_adapters(target)
        server.held = target

    async def _restore(self, server: EngineServer) -> None:
        delay = min(0.2, self._probe_seconds)
        try:
            while True:
                try:
                    await self._bring_back(server)
                    return
                except (Unreachable, RequestRefused, Unsuitable, DomainError) as error:
                    if str(error) != server.problem:
                        log.warning("server stays out", server=server.address, problem=str(error))
                    server.problem = str(error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, max(self._probe_seconds, 0.2) * 8)
        finally:
            self._restoring.discard(server)

    async def _bring_back(self, server: EngineServer) -> None:
        await self._look(server)
        async with self.changing:
            if self.released:
                raise Unreachable("its memory is released")
            await self.load(server, self.target, checked=False)
            if self.admit is not None:
                await self.admit(server, self.target.weights)
            await server.accept()
            await server.unload_others(self.target)
            self.let_in(server)

    async def _probe(self, server: EngineServer) -> None:
        missed = 0
        while True:
            await asyncio.sleep(self._probe_seconds)
            if not server.serving or self.changing.locked() or self.released:
                missed = 0
                continue
            try:
                await server.probe()
                missed = 0
            except Unsuitable as error:
                if not self.changing.locked():
                    self.take_out(server, str(error))
            except (Unreachable, RequestRefused) as error:
                missed += 1
                if missed >= _MISSED_PROBES:
                    self.take_out(server, str(error))


def place_of(session_id: str, adapter: str, token_ids: Sequence[int]) -> object:
    """The key of requests that share a prefix: the session, or else the beginning of the prompt."""
    if session_id:
        return session_id
    return adapter, hashlib.blake2b(array("q", token_ids[:_PREFIX]).tobytes(), digest_size=16).digest()
