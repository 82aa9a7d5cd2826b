"""What one caller may use of a server at once, so that none exhausts it for the others.

A caller is its credential: a token, or a certificate. Without one it is its address; of IPv6 the network of 64 bits,
which one machine usually has for itself.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from hashlib import sha256
from typing import TypeVar
from urllib.parse import unquote

from mulligan.common.errors import DomainError, Reason
from mulligan.common.rate import TokenBucket
from mulligan.common.tasks import TimeLimit, TooLong

T = TypeVar("T")
_RETRY_AFTER = timedelta(seconds=1)
_MOST_REMEMBERED = 4_096  # callers without a call under way, whose rate is known

# The caller whose call runs, for what counts by caller deeper in a service; "" outside of calls.
current_caller: ContextVar[str] = ContextVar("current_caller", default="")


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """`receiving` is the number of single requests that are received of one caller at once, `streams` that of its calls
    that stream requests. `held_bytes` is the size of all requests and answers of its calls. `calls_per_second` 0: any
    number. `idle_seconds` is how long a stream of requests may say nothing. `calls_of_all` is the number of calls of
    all callers together but those of this machine, and `receiving_of_all` that of requests of them that are received at
    once; `request_bytes` is the size of a single request; 0: any."""

    calls: int = 16_384
    calls_per_second: float = 0.0
    held_bytes: int = 2**30
    receiving: int = 8
    streams: int = 8
    receive_seconds: float = 60.0
    idle_seconds: float = 86_400.0
    calls_of_all: int = 0
    receiving_of_all: int = 0
    request_bytes: int = 0


# Of calls that need no credential. Their requests are small and arrive at once, unless somebody plays tricks. But gRPC
# takes as much as the largest message of any call before it lets anybody see how much that is, so that few are received
# at once, of however many callers.
CHECK_LIMITS = CallerLimits(
    calls=256,
    held_bytes=2**26,
    receiving=1,
    receive_seconds=2.0,
    calls_of_all=1_024,
    receiving_of_all=2,
    request_bytes=4_096,
)
# A watch lasts as long as its caller likes.
WATCH_LIMITS = replace(CHECK_LIMITS, calls=64, receiving_of_all=1)
# Probes of a container come from here, whatever strangers do.
_OF_THIS_MACHINE = {"address 127.0.0.1", "address ::/64", "unix"}


class Caller:
    """What the calls of one caller use now."""

    __slots__ = ("_limits", "_rate", "_receiving", "calls", "held_bytes", "key", "streams")

    def __init__(self, key: str, limits: CallerLimits):
        self.key = key
        self.calls = 0
        self.streams = 0  # calls of which requests are streamed
        self.held_bytes = 0
        self._limits = limits
        self._receiving = asyncio.Semaphore(limits.receiving)
        rate = limits.calls_per_second
        self._rate = TokenBucket(rate, max(rate, 1.0)) if rate else None

    @property
    def receiving(self) -> asyncio.Semaphore:
        """Held while a message is received. Those that wait for it take at most a stream's window of memory each."""
        return self._receiving

    def check(self, streams: bool) -> None:
        """Raises CALLER_LIMIT if a further call would be too many."""
        limits = self._limits
        if self.calls >= limits.calls:
            raise self._refused(f"{self.calls} of its calls run", limits.calls, "calls")
        if streams and self.streams >= limits.streams:
            raise self._refused(f"{self.streams} of its calls stream requests", limits.streams, "streams")
        if self.held_bytes >= limits.held_bytes:
            raise self._refused(f"its calls hold {self.held_bytes} bytes", limits.held_bytes, "bytes")
        if self._rate is not None and not self._rate.take():
            raise self._refused("it calls too often", limits.calls_per_second, "calls_per_second")

    def _refused(self, used: str, limit: float, name: str) -> DomainError:
        message = f"the caller has reached a limit of this server: {used}, of {limit:g} at most"
        return DomainError(Reason.CALLER_LIMIT, message, retry_after=_RETRY_AFTER, limit=name)


class Visit:
    """One call of a caller, from its admission until its answer was sent. Raises CALLER_LIMIT."""

    __slots__ = ("_callers", "_held_bytes", "_streams", "caller")

    def __init__(self, callers: Callers, key: str, streams: bool):
        self._callers = callers
        self._streams = streams
        self._held_bytes = 0
        callers.check(key)  # before a caller is remembered
        self.caller = callers.find(key)
        self.caller.check(streams)
        self.caller.calls += 1
        callers.calls += 1
        self.caller.streams += streams

    async def receive(self, read: Callable[[], Awaitable[T]]) -> T:
        """Waits for a message, at the caller's turn. Raises CALLER_LIMIT."""
        limit = self._callers.receiving
        try:
            async with self.caller.receiving, self._callers.turn(self.caller.key):
                return await limit.within(read())
        except TooLong:
            text = f"the request did not arrive within {limit.seconds:g} s"
            raise DomainError(Reason.CALLER_LIMIT, text, limit="receive_seconds") from None

    async def receive_stream(self, messages: AsyncIterable[T]) -> AsyncIterator[T]:
        """Raises CALLER_LIMIT."""
        limit = self._callers.idle
        reading = aiter(messages)
        try:
            while True:
                yield await limit.within(anext(reading))
        except StopAsyncIteration:
            return
        except TooLong:
            text = f"no request arrived for {limit.seconds:g} s"
            raise DomainError(Reason.CALLER_LIMIT, text, limit="idle_seconds") from None

    def take(self, size: int) -> None:
        """As `hold`, of a single request. Raises MALFORMED_MESSAGE for one that is too large to be one of this call."""
        self.hold(size)
        most = self._callers.limits.request_bytes
        if most and size > most:
            text = f"a request of {size} bytes: expected at most {most} of a call that needs no credential"
            raise DomainError(Reason.MALFORMED_MESSAGE, text)

    def hold(self, size: int) -> None:
        """Counts bytes of a request or an answer until the end of the call."""
        self._held_bytes += size
        self.caller.held_bytes += size

    def end(self) -> None:
        self.caller.calls -= 1
        self._callers.calls -= 1
        self.caller.streams -= self._streams
        self.caller.held_bytes -= self._held_bytes
        self._callers.left(self.caller)


class Callers:
    """All callers of a server. It has an entry for each that has a call under way. If their rates are limited, it also
    has those that called last."""

    def __init__(self, limits: CallerLimits):
        self.limits = limits
        self.calls = 0  # of all of them
        self._turns = asyncio.Semaphore(limits.receiving_of_all) if limits.receiving_of_all else None
        self.receiving = TimeLimit(limits.receive_seconds)
        self.idle = TimeLimit(limits.idle_seconds)
        self._known: OrderedDict[str, Caller] = OrderedDict()  # those that have called last at the end

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str) -> Caller:
        caller = self._known.get(key)
        if caller is None:
            caller = self._known[key] = Caller(key, self.limits)
        return caller

    def turn(self, key: str) -> AbstractAsyncContextManager[None]:
        """Held by a caller while a message of it is received. Callers get it in the order in which they asked."""
        return nullcontext() if self._turns is None or key in _OF_THIS_MACHINE else self._turns

    def check(self, key: str) -> None:
        """Raises CALLER_LIMIT if a further call of anybody would be too many."""
        most = self.limits.calls_of_all
        if most and self.calls >= most and key not in _OF_THIS_MACHINE:
            text = f"the server has {self.calls} such calls of callers without a credential, of {most} at most"
            raise DomainError(Reason.CALLER_LIMIT, text, retry_after=_RETRY_AFTER, limit="calls_of_all")

    def left(self, caller: Caller) -> None:
        if caller.calls:
            return
        if not self.limits.calls_per_second:
            self._known.pop(caller.key, None)
            return
        self._known.move_to_end(caller.key)
        if len(self._known) > _MOST_REMEMBERED:
            idle = next((key for key, known in self._known.items() if not known.calls), None)
            if idle is not None:
                del self._known[idle]


def by_token(authorization: str) -> str:
    """The key of a caller with this `authorization`, which tells nothing about it."""
    return f"token {sha256(authorization.encode(errors='surrogateescape')).hexdigest()[:16]}"


def by_certificate(pem: bytes) -> str:
    return f"certificate {sha256(pem).hexdigest()[:16]}"


@lru_cache(1_024)
def _network(host: str) -> str:
    try:
        address = ipaddress.ip_address(unquote(host).strip("[]").partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


def by_address(peer: str) -> str:
    """Of a peer as gRPC writes it: `ipv4:127.0.0.1:4711`, `ipv6:%5B::1%5D:4711`, `unix:PATH`."""
    family, _, rest = peer.partition(":")
    if family not in ("ipv4", "ipv6"):
        return family
    return f"address {_network(rest.rpartition(':')[0])}"
