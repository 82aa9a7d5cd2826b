"""A network between the services that loses, delays and reorders calls, has some of them arrive twice, and falls apart.

`services/testing/faulty_network.py` breaks connections; here it is calls, so the server also gets copies of old ones,
and later calls before earlier ones.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc

from mulligan.common.tasks import cancel

_BYTES = 64 * 2**20  # of a message
_OPTIONS = [("grpc.max_receive_message_length", _BYTES), ("grpc.max_send_message_length", _BYTES)]
_RECONNECT = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
_PASSED_ON = ("authorization", "mulligan-")  # beginnings of the names of metadata
_LOST = "the network lost it"
_UNMET_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class CallFaults:
    """Shares of the calls that are struck so; times in seconds. `lost_once` names calls of which every first answer is
    lost."""

    lost_requests: float = 0.03
    lost_answers: float = 0.05
    late_copies: float = 0.05  # arrive once more, long after the answer
    overtaken: float = 0.05  # wait until another call has passed
    delayed: float = 0.1
    delay: float = 0.05  # at most
    late: float = 1.0  # a copy, at most
    overtaking: float = 0.3  # a call waits for another one, at most
    lost_once: frozenset[str] = frozenset()


@dataclass
class FaultyCalls:
    """Stands before one server, to which it speaks TLS if it has `ca`, the authorities to trust. `happened` counts the
    faults. While it `is_parted` nothing passes."""

    target: Callable[[], str]
    faults: CallFaults
    chance: random.Random
    happened: Counter[str] = field(default_factory=Counter)
    address: str = ""
    ca: bytes = b""

    def __post_init__(self) -> None:
        self.calm = False  # no faults any more, but for those of `lost_once`
        self._passed = asyncio.Event()
        self._whole = asyncio.Event()
        self._whole.set()
        self._met = asyncio.Event()  # a call waits for the end of a partition
        self._loses = False  # the next call whose partition has ended, for sure
        self._copies: set[asyncio.Task[None]] = set()
        self._seen: set[tuple[str, bytes]] = set()

    async def start(self, address: str = "127.0.0.1:0") -> None:
        self._channel = channel_to(self.target(), self.ca, [*_OPTIONS, *_RECONNECT])
        self._server = grpc.aio.server(options=_OPTIONS)
        self._server.add_generic_rpc_handlers((_Any(self),))
        self.address = f"{address.rpartition(':')[0]}:{self._server.add_insecure_port(address)}"
        await self._server.start()

    async def stop(self) -> None:
        await cancel(*self._copies)
        await self._server.stop(None)
        await self._channel.close()

    async def part(self, seconds: float) -> None:
        """Nothing passes for so long, and until a call has met it, for at most twenty seconds more. Of the calls that
        waited one is lost, and half of the others."""
        self.happened["partitions"] += 1
        self._met.clear()
        self._whole.clear()
        self._loses = True
        try:
            await asyncio.sleep(seconds)
            with suppress(TimeoutError):
                async with asyncio.timeout(_UNMET_SECONDS):
                    await self._met.wait()
        finally:
            self._whole.set()

    async def carry(self, method: str, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        sent = [request async for request in requests]
        metadata = [(key, value) for key, value in context.invocation_metadata() or () if key.startswith(_PASSED_ON)]
        await self._before(context)
        strikes = self._strikes(method, sent)
        try:
            answers = [answer async for answer in self._forward(method, sent, metadata, context.time_remaining())]
        except grpc.aio.AioRpcError as error:
            details = [(key, value) for key, value in error.trailing_metadata() or () if key.endswith("-details-bin")]
            context.set_trailing_metadata(tuple(details))
            await context.abort(error.code(), error.details() or "")
        self._passed.set()
        self._passed.clear()
        if not self.calm and self.chance.random() < self.faults.late_copies:
            copy = asyncio.create_task(self._copy(method, sent, metadata))
            self._copies.add(copy)
            copy.add_done_callback(self._copies.discard)
        if strikes:
            self.happened["lost_answers"] += 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, _LOST)
        for answer in answers:
            yield answer

    def _strikes(self, method: str, sent: list[bytes]) -> bool:
        """Whether the call's answer is lost."""
        if method.rpartition("/")[2] in self.faults.lost_once:
            key = (method, sent[0])
            self._seen ^= {key}
            return key in self._seen
        return not self.calm and self.chance.random() < self.faults.lost_answers

    async def _before(self, context: Any) -> None:
        if not self._whole.is_set():
            self._met.set()
            await self._whole.wait()
            if self.chance.random() < 0.5 or self._loses:
                self._loses = False
                self.happened["lost_in_partitions"] += 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, _LOST)
        if self.calm:
            return
        draw = self.chance.random()
        faults = self.faults
        if draw < faults.lost_requests:
            self.happened["lost_requests"] += 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, _LOST)
        elif draw < faults.lost_requests + faults.overtaken:
            self.happened["overtaken"] += 1
            try:
                async with asyncio.timeout(faults.overtaking):
                    await self._passed.wait()
            except TimeoutError:
                pass
        elif draw < faults.lost_requests + faults.overtaken + faults.delayed:
            self.happened["delayed"] += 1
            await asyncio.sleep(self.chance.uniform(0, faults.delay))

    def _forward(self, method: str, sent: list[bytes], metadata: Any, timeout: float | None) -> Any:
        call: Any = self._channel.stream_stream(method)
        return call(iter(sent), metadata=metadata, timeout=timeout)

    async def _copy(self, method: str, sent: list[bytes], metadata: Any) -> None:
        await asyncio.sleep(self.chance.uniform(0, self.faults.late))
        self.happened["late_copies"] += 1
        try:
            async for _ in self._forward(method, sent, metadata, 10.0):
                pass
        except grpc.aio.AioRpcError:
            pass


def channel_to(address: str, ca: bytes, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
    """With TLS if there are authorities to trust."""
    if not ca:
        return grpc.aio.insecure_channel(address, list(options))
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca), list(options))


class _Any(grpc.GenericRpcHandler):
    """Takes every call as a stream of bytes."""

    def __init__(self, network: FaultyCalls):
        self._network = network

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = str(handler_call_details.method)

        async def carry(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for answer in self._network.carry(method, requests, context):
                yield answer

        return grpc.stream_stream_rpc_method_handler(carry)
