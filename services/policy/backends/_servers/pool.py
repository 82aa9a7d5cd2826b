"""The servers of one policy: which one gets a request, which weights they hold, and how those that fail come back."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

import structlog
from cachetools import LRUCache

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, VersionSpan
from mulligan.common.tasks import Broadcast, cancel
from mulligan.policy.backend import Admission, WeightsFile
from mulligan.policy.backends._servers.answers import BadAnswer
from mulligan.policy.backends._servers.connection import RequestRefused, Unreachable
from mulligan.policy.backends._servers.folders import Folders, TargetWeights, known_as
from mulligan.policy.backends._servers.server import EngineServer, Unsuitable

log = structlog.get_logger()
_LEAVE_SECONDS = 5.0
_MISSED_PROBES = 3  # that a busy server may leave unanswered
_RETRY_AFTER = timedelta(seconds=1)
_KEPT_PLACES = 65536  # conversations whose server is remembered
_KEPT_VERSIONS = 4096  # labels of weights; an answer names those that served while it was sampled
_PREFIX = 256  # tokens by which prompts without a session are kept together
_SLACK = 8  # requests that a conversation's server may have above one and a half times the least


class ServerPool:
    """`look` finds out what a server is, and raises Unsuitable. `target` is what all servers must hold.

    A request is sent by `dispatch`, and `spans` tells which versions its answer came from. An `update` has all servers
    load new weights at once, and each checked by `admit`: either all serve them, or all load the old ones again. A
    server that fails is taken out (`take_out`), until `_restore` has loaded `target` and had it checked.

    What servers hold changes under `_changing`. The policy's lock is not enough: servers are restored, and adapters
    that are not used any more are unloaded, in the background, at no call of the policy.
    """

    def __init__(
        self,
        servers: Sequence[EngineServer],
        target: TargetWeights,
        look: Callable[[EngineServer], Coroutine[Any, Any, None]],
        folders: Folders,
        *,
        probe_seconds: float,
        wait_seconds: float,
    ):
        self.servers = servers
        self.target = target
        self._admission: Admission | None = None  # None until the first update
        self._changing = asyncio.Lock()
        self._released = False
        self._look = look
        self._folders = folders
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
        """A guest takes its adapters along. Where a server does not answer in time, the next guest removes them."""
        await cancel(*self._tasks)
        if self._folders.is_guest:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LEAVE_SECONDS):
                    await asyncio.gather(*(server.leave() for server in self.servers), return_exceptions=True)

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
        self._versions.pop(target.label, None)
        self._versions[target.label] = (version, target.generation)  # the last ones were known last
        while len(self._versions) > _KEPT_VERSIONS:
            del self._versions[next(iter(self._versions))]

    def spans(self, target: TargetWeights, labels: Sequence[tuple[str, int]], *, own: bool) -> tuple[VersionSpan, ...]:
        """Turns the servers' labels of weights into policy versions, for a request that was sent while `target` was to
        be served. With `own` the request used the target's adapter. Raises BadAnswer."""
        found: list[VersionSpan] = []
        for told, count in labels:
            label = known_as(told, guest=self._folders.is_guest)
            version, generation = self._versions.get(label, (0, -1))
            if own and target.adapter:
                if label != target.label:
                    raise BadAnswer(f"an adapter was used over the weights {label!r} instead of {target.label!r}")
                version = target.weights.policy_version
            elif generation < target.generation:
                raise BadAnswer(f"an answer came from weights {label!r} instead of {target.label!r}")
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

    # Weights

    async def update(self, weights: WeightsFile, admit: Admission) -> None:
        """As `Backend.update_weights`. A server that fails meanwhile is taken out, and the others go on."""
        target = await asyncio.to_thread(self._folders.prepare, weights)
        try:
            async with self._changing:
                if self._released:
                    raise DomainError(Reason.ENGINE_UNAVAILABLE, "the servers' memory is released")
                await self._exchange(target, admit)
        finally:
            if self.target is not target:
                await asyncio.to_thread(self._folders.remove, target)

    async def _exchange(self, target: TargetWeights, admit: Admission) -> None:
        before = self.target
        serving = [server for server in self.servers if server.serving]
        if not serving:
            raise self.unavailable()
        async with AsyncExitStack() as stack:
            # A running request on an adapter cannot go on over another base, nor one on the base below an adapter. For
            # a guest there is one base.
            rebase = not self._folders.is_guest and (
                not target.adapter or any(server.label != target.label for server in serving)
            )
            if rebase and (before.adapter or target.adapter):
                await stack.enter_async_context(self.drained())
            self.know(target)
            refused = await (self._load_all(serving, target) if rebase else self._load_adapters(serving, target))
            if refused:
                await self._put_back(serving, before, rebase=rebase)
                raise DomainError(Reason.MODEL_MISMATCH, f"{self.engine} refuses the weights: {refused}")
            if not any(server.held is target for server in serving):
                raise self.unavailable()
            self.target = target
            self._admission = admit
        for server in serving:
            await self._admit(server, target, admit)
        if not any(server.serving for server in serving):
            self.target = before
            self.know(before)
            raise self.unavailable()
        self.run(self._retire(before))

    async def _admit(self, server: EngineServer, target: TargetWeights, admit: Admission) -> None:
        if server.held is not target:  # it died
            return
        try:
            await admit(server, target.weights)
        except DomainError as error:
            if error.reason is not Reason.ENGINE_UNAVAILABLE:
                raise
            self.take_out(server, error.message)

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
        self.know(before)

        async def put_back(server: EngineServer) -> None:
            if rebase:
                await self.load(server, before)
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
                self.take_out(server, str(error))
                return False
            return True

        alive = await asyncio.gather(*(one(server) for server in servers))
        return [server for server, lives in zip(servers, alive, strict=True) if lives]

    async def _retire(self, target: TargetWeights) -> None:
        """Unloads an adapter after its last request, and removes the files."""
        while target.running:
            await self._changed.wait()
        async with self._changing:
            if target is self.target:
                return
            if target.adapter:
                await self._each(self.servers, lambda server: server.unload(target.adapter))
            await asyncio.to_thread(self._folders.remove, target)

    async def release_memory(self) -> None:
        """Releases the memory of all servers that serve. No request may run."""
        async with self._changing:
            if not await self._each(self.servers, lambda server: server.release_memory()):
                raise self.unavailable()
            self._released = True

    async def resume_memory(self) -> None:
        """Takes the memory again and loads the weights, since released memory is empty."""

        async def resume(server: EngineServer) -> None:
            await server.resume_memory()
            await self.load(server, self.target)

        async with self._changing:
            self._released = False
            if not await self._each(self.servers, resume):
                raise self.unavailable()

    async def load(self, server: EngineServer, target: TargetWeights, *, checked: bool = True) -> None:
        """Makes the server hold `target`, whatever it holds now. Raises Unreachable, RequestRefused, Unsuitable."""
        await server.load_weights(target, checked=checked)
        if Feature.LORA_WEIGHTS in server.features:
            await server.load_adapters(target)
        server.held = target

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
        async with self._changing:
            if self._released:
                raise Unreachable("its memory is released")
            await self.load(server, self.target, checked=False)
            if self._admission is not None:
                await self._admission(server, self.target.weights)
            await server.accept()
            await server.unload_others(self.target)
            self.let_in(server)

    async def _probe(self, server: EngineServer) -> None:
        missed = 0
        while True:
            await asyncio.sleep(self._probe_seconds)
            if not server.serving or self._changing.locked() or self._released:
                missed = 0
                continue
            try:
                await server.probe()
                missed = 0
            except Unsuitable as error:
                if not self._changing.locked():
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
