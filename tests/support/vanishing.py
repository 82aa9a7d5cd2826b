"""A server whose caller vanishes at a chosen moment: the handler is cancelled at its n-th wait, as gRPC cancels it when
its caller leaves. So is the handler of a streaming answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from mulligan.common.server import RequestInterceptor


@dataclass
class Vanishing(grpc.aio.ServerInterceptor):
    """`at` is the moment of the next call at which its caller vanishes, from 1; 0: never. `vanished` is set then, and
    `left` counts it by method. A moment is a wait of the handler; with `in_turns` it is a turn of the event loop, so
    that the tasks of the handler are met at their waits, too."""

    at: int = 0
    in_turns: bool = False
    vanished: asyncio.Event = field(default_factory=asyncio.Event)
    left: Counter[str] = field(default_factory=Counter)

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        asks = "stream" if handler.request_streaming else "unary"
        answers = "stream" if handler.response_streaming else "unary"
        call = getattr(handler, f"{asks}_{answers}")
        make = getattr(grpc, f"{asks}_{answers}_rpc_method_handler")

        async def handle(request: Any, context: Any) -> Any:
            at, self.at = self.at, 0
            if not at:
                return await call(request, context)
            task = asyncio.current_task()
            assert task is not None

            def vanish() -> None:
                self.vanished.set()
                self.left[details.method] += 1
                task.cancel()

            if not self.in_turns:
                return await _Interrupted(call(request, context), at, vanish)
            turns = _Turns(at, vanish)
            try:
                return await call(request, context)
            finally:
                turns.stop()

        return make(handle, handler.request_deserializer, handler.response_serializer)


class _Turns:
    """Calls `vanish` after so many turns of the event loop, unless it is stopped before."""

    def __init__(self, left: int, vanish: Callable[[], None]):
        self._left = left
        self._vanish = vanish
        self._turn()

    def _turn(self) -> None:
        self._left -= 1
        if self._left < 0:
            self._vanish()
        else:
            self._next = asyncio.get_running_loop().call_soon(self._turn)

    def stop(self) -> None:
        self._next.cancel()


class _Interrupted:
    def __init__(self, work: Awaitable[Any], at: int, vanish: Callable[[], None]) -> None:
        self._work = work
        self._at = at
        self._vanish = vanish

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
                self._vanish()
            raised = None
            try:
                yield waiting_for
            except BaseException as error:  # noqa: BLE001 - it is the handler's, which may go on
                raised = error


# One call: who makes it vanishes at each moment, and after each the case looks at what is left. It may use the folder.
Case = Callable[[Path, Vanishing], Awaitable[None]]


@asynccontextmanager
async def vanishing(
    add: Callable[[grpc.aio.Server], Any], caller: Vanishing | None = None
) -> AsyncIterator[tuple[Vanishing, grpc.aio.Channel]]:
    """A server, and a channel to it."""
    caller = caller or Vanishing()
    server = grpc.aio.server(interceptors=[caller, RequestInterceptor()])
    add(server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield caller, channel
    await server.stop(None)


async def at_each_wait(caller: Vanishing, call: Callable[[], Any], check: Callable[[Any], Awaitable[None]]) -> int:
    """Makes the call again and again; its caller vanishes at a later moment each time, until one is answered. `check`
    gets None, or the answer. Returns at how many moments it vanished."""
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
    """A list of the messages of a stream."""
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            return [message async for message in call]
        return await call
    except asyncio.CancelledError:  # what a call raises that was cancelled
        return None
