"""A server whose caller vanishes at a chosen moment: the handler is cancelled at its n-th wait, as gRPC cancels it when
its caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from mulligan.common.server import RequestInterceptor


@dataclass
class Vanishing(grpc.aio.ServerInterceptor):
    """`at` is the wait of the next call at which its caller vanishes, from 1; 0: never. `vanished` is set then."""

    at: int = 0
    vanished: asyncio.Event = field(default_factory=asyncio.Event)

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        kind = "stream" if handler.request_streaming else "unary"
        if handler.response_streaming:
            return handler
        call = getattr(handler, f"{kind}_unary")
        make = getattr(grpc, f"{kind}_unary_rpc_method_handler")

        async def handle(request: Any, context: Any) -> Any:
            at, self.at = self.at, 0
            return await _Interrupted(call(request, context), at, self)

        return make(handle, handler.request_deserializer, handler.response_serializer)


class _Interrupted:
    def __init__(self, work: Awaitable[Any], at: int, told: Vanishing) -> None:
        self._work = work
        self._at = at
        self._told = told

    def __await__(self) -> Generator[Any, Any, Any]:
        steps: Any = self._work.__await__()
        waits = 0
        raised: BaseException | None = None  # at the last wait
        while True:
            try:
                waiting_for = steps.send(None) if raised is None else steps.throw(raised)
            except StopIteration as end:
                return end.value
            waits += 1
            if waits == self._at:
                self._told.vanished.set()
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            raised = None
            try:
                yield waiting_for
            except BaseException as error:  # noqa: BLE001 - it is the handler's, which may go on
                raised = error


@asynccontextmanager
async def vanishing(add: Callable[[grpc.aio.Server], Any]) -> AsyncIterator[tuple[Vanishing, grpc.aio.Channel]]:
    """A server, and a channel to it."""
    caller = Vanishing()
    server = grpc.aio.server(interceptors=[caller, RequestInterceptor()])
    add(server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield caller, channel
    await server.stop(None)


async def at_each_wait(caller: Vanishing, call: Callable[[], Any], check: Callable[[Any], Awaitable[None]]) -> int:
    """Makes the call again and again; its caller vanishes at a later wait each time, until one is answered. `check`
    gets None, or the answer. Returns at how many waits it vanished."""
    for place in range(1, 1000):
        caller.at = place
        caller.vanished.clear()
        answer = await _answer(caller, call())
        await check(answer)
        if not caller.vanished.is_set():
            return place - 1
    raise AssertionError("the call never ends")


async def _answer(caller: Vanishing, call: Any) -> Any:
    """None if the caller vanished."""
    vanished = asyncio.ensure_future(caller.vanished.wait())
    answered = asyncio.ensure_future(_result(call))
    await asyncio.wait([vanished, answered], return_when=asyncio.FIRST_COMPLETED)
    vanished.cancel()
    if caller.vanished.is_set():
        call.cancel()  # gRPC answers nothing to a caller that it believes to have left
        await asyncio.wait([answered])
    return answered.result()


async def _result(call: Any) -> Any:
    try:
        return await call
    except asyncio.CancelledError:  # what a call raises that was cancelled
        return None
