"""Several servers of one service, as a client sees them: which exist, which are usable, and when one returns.

A server that fails a call is not used until it passes a check. A server that a DNS name newly resolves to joins when it
passes. Which server gets a call, and what happens to a failed call, is decided in the service's own `replicas.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import structlog

from mulligan.common.addresses import Addresses
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.tasks import Broadcast, cancel
from mulligan.common.tracing import untraced
from mulligan.common.waits import Waits

log = structlog.get_logger()
_NOT_ASKED = "not asked yet"
_FIRST_SECONDS = 5.0  # limit of the first checks; afterwards the servers that answered are used
# delay between two checks of a server that fails them
_FIRST_DELAY_SECONDS = 0.1
_MAX_DELAY_SECONDS = 2.0
# delay between two DNS look-ups, and its minimum after a failure
_LOOK_UP_SECONDS = 5.0
_LOOK_UP_AGAIN_SECONDS = 0.5


class Client(Protocol):
    async def close(self) -> None: ...


C = TypeVar("C", bound=Client)


@dataclass(eq=False)
class ServerReplica(Generic[C]):
    """One server. `problem` says why it is not used; "" means that it is."""

    address: str
    client: C
    problem: str = _NOT_ASKED
    in_flight: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)  # set after the first check
    checking: asyncio.Task[None] | None = None


class Replicas(Generic[C]):
    """The servers of one service, kept up to date in the background.

    `connect` makes the client of an address; its calls must fail at once when the server is away. `check` raises while
    a server cannot be used, and returns False to be called again for one that can be used. `notice` is told of changes.

    The first call to `ready` looks the addresses up, starts a task per server that checks it until it passes, and a
    task that follows DNS names. A caller takes a server from `usable`, reports a failure with `failed`, and waits with
    `change` when there is no other.
    """

    def __init__(
        self,
        addresses: Addresses,
        connect: Callable[[str], C],
        check: Callable[[ServerReplica[C]], Awaitable[bool]],
        *,
        outage_seconds: float,
        notice: Callable[[str], None] | None = None,
    ):
        self.text = addresses.text
        self.outage_seconds = outage_seconds
        self._addresses = addresses
        self._connect = connect
        self._check = check
        self._notice = notice or (lambda text: None)
        self.waits = Waits(addresses.text)  # for all of them; those for a single one are told as `problem`
        self._known: dict[str, ServerReplica[C]] = {}  # including those that left: an episode may still be there
        self._present: dict[str, ServerReplica[C]] = {}
        self._changed = Broadcast()
        self._look_up_now = asyncio.Event()
        self._no_address = ""
        self._starting: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def present(self) -> list[ServerReplica[C]]:
        return list(self._present.values())

    @property
    def usable(self) -> list[ServerReplica[C]]:
        return [replica for replica in self._present.values() if not replica.problem]

    @property
    def problems(self) -> str:
        found = [f"{replica.address}: {replica.problem}" for replica in self._present.values() if replica.problem]
        return "; ".join(found) or self._no_address or "no server can be used"

    async def ready(self) -> None:
        """Returns when all servers were checked once, or after a few seconds."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        if not self._starting.done():
            await asyncio.shield(self._starting)

    async def change(self, since: float) -> None:
        """Waits until the state of a server changes. Raises ServiceUnavailable at `outage_seconds` after `since`, a
        value of `time.monotonic`."""
        left = since + self.outage_seconds - time.monotonic()
        try:
            with self.waits.call() as wait:
                wait.begin(self.problems)
                async with asyncio.timeout(max(left, 0.0)):
                    await self._changed.wait()
        except TimeoutError:
            raise ServiceUnavailable(self.text, time.monotonic() - since, self.problems) from None

    def failed(self, replica: ServerReplica[C], problem: str) -> None:
        """Stops using a server until it passes a check."""
        self._set(replica, problem or "away")
        self.check(replica)
        self._look_up_now.set()

    def check(self, replica: ServerReplica[C]) -> None:
        """Checks a server in the background until it passes."""
        if self._present.get(replica.address) is replica and (replica.checking is None or replica.checking.done()):
            replica.checking = asyncio.create_task(self._keep_checking(replica), context=untraced())

    async def suspend(self, replica: ServerReplica[C]) -> None:
        """Cancels the running checks of a server."""
        task = replica.checking
        replica.checking = None
        await cancel(task)

    def wake(self) -> None:
        """Wakes the callers of `change`."""
        self._changed.wake_all()

    def tell(self, text: str, **facts: object) -> None:
        log.warning(text, **facts)
        self._notice(" ".join([text, *(f"{name}={value}" for name, value in facts.items())]))

    async def close(self) -> None:
        await cancel(self._starting, self._following, *(replica.checking for replica in self._known.values()))
        for replica in self._known.values():
            await replica.client.close()

    async def _start(self) -> None:
        await self._look_up()
        if self._addresses.names:
            self._following = asyncio.create_task(self._follow(), context=untraced())
        first = [asyncio.create_task(replica.asked.wait()) for replica in self.present]
        if first:
            _, pending = await asyncio.wait(first, timeout=_FIRST_SECONDS)
            for task in pending:
                task.cancel()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_UP_AGAIN_SECONDS)
            try:
                async with asyncio.timeout(_LOOK_UP_SECONDS):
                    await self._look_up_now.wait()
            except TimeoutError:
                pass
            self._look_up_now.clear()
            await self._look_up()

    async def _look_up(self) -> None:
        try:
            found = await self._addresses.look_up()
        except OSError as error:  # a name does not resolve while its service is down or starting
            self._no_address = str(error)
            found = tuple(self._present) or self._addresses.fixed
        for address in found:
            if address not in self._present:
                self._join(address)
        for address in [address for address in self._present if address not in found]:
            replica = self._present.pop(address)
            await self.suspend(replica)
            log.info("a server left", endpoint=self.text, address=address)
            self.wake()

    def _join(self, address: str) -> None:
        if address not in self._known:
            self._known[address] = ServerReplica(address, self._connect(address))
        replica = self._present[address] = self._known[address]
        replica.problem = _NOT_ASKED
        self.check(replica)

    async def _keep_checking(self, replica: ServerReplica[C]) -> None:
        delay = _FIRST_DELAY_SECONDS
        while not await self._passes(replica):
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MAX_DELAY_SECONDS)

    async def _passes(self, replica: ServerReplica[C]) -> bool:
        try:
            passed = await self._check(replica)
        except ServiceUnavailable as error:
            problem = error.cause or "away"
            passed = False
        except (CallFailed, DomainError, OSError) as error:
            problem = str(error)
            passed = False
        except Exception as error:  # a bug in `check`; nothing else would report it
            log.exception("a server could not be checked", address=replica.address)
            problem = repr(error)
            passed = False
        else:
            problem = ""
        self._set(replica, problem)
        replica.asked.set()
        return passed

    def _set(self, replica: ServerReplica[C], problem: str) -> None:
        before = replica.problem
        replica.problem = problem
        if problem == before:
            return
        if problem and before in ("", _NOT_ASKED):
            self.tell("a server is not used", endpoint=replica.address, cause=problem)
        elif not problem and before != _NOT_ASKED:
            self.tell("a server is used again", endpoint=replica.address)
        elif not problem:
            log.info("a server is used", endpoint=replica.address)
        self.wake()
