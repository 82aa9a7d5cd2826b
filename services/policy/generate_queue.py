"""The part of the policy's client that sends Generate requests together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mulligan.common.channel import Connection, is_for_later
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.gathering import Gathering, cancel_without_callers
from mulligan.common.status import item_error
from mulligan.common.tasks import cancel
from mulligan.common.tracing import Origin, origin, span
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc

_MAX_BATCH = 256  # requests in one call
_MAX_BATCH_BYTES = 2 * 2**20
_GATHER_SECONDS = 0.004  # a pass of a small model takes longer


class _Waiting(NamedTuple):
    future: asyncio.Future[pb.GenerateResponse | None]  # None: to be asked for in a call of its own
    request: pb.GenerateRequest
    origin: Origin | None


class GenerateQueue:
    """Sends the Generate requests of one moment in one GenerateMany call. While other requests are under way, a moment
    lasts `_GATHER_SECONDS`; otherwise it is one tick of the event loop.

    A request that is alone goes by Generate. So does what GenerateMany did not answer: the server does not have that
    call, it went away, it refused all because of one, or it asks for a later try.
    """

    def __init__(self, connection: Connection, stub: pb_grpc.PolicyServiceStub, timeout: float):
        self._connection = connection
        self._stub = stub
        self._timeout = timeout  # seconds, of a call
        self._gathering: Gathering[_Waiting] = Gathering(self._flush, _GATHER_SECONDS, _MAX_BATCH)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_offered = True

    async def put(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        """Raises as `Connection.call` does."""
        with span("generate", request_id=request.request_id, session_id=request.session_id):
            return await self._put(request)

    async def _put(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        if self._is_offered:
            waiting = _Waiting(asyncio.get_running_loop().create_future(), request, origin())
            self._gathering.put(waiting)
            answer = await waiting.future
            if answer is not None:
                return answer
        with self._gathering.under_way():
            return await self._connection.call(self._stub.Generate, request, timeout=self._timeout)

    async def close(self) -> None:
        for waiting in self._gathering.close():
            waiting.future.cancel()
        await cancel(*self._tasks)

    def _flush(self, waiting: Sequence[_Waiting]) -> None:
        for batch in _batches([one for one in waiting if not one.future.done()]):  # done: its caller was cancelled
            if len(batch) == 1:
                batch[0].future.set_result(None)
                continue
            task = asyncio.create_task(self._send(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            cancel_without_callers(task, [waiting.future for waiting in batch])

    async def _send(self, batch: Sequence[_Waiting]) -> None:
        """Completes all futures of the batch."""
        with self._gathering.under_way():
            await self._ask(batch)

    async def _ask(self, batch: Sequence[_Waiting]) -> None:
        request = pb.GenerateManyRequest(requests=[waiting.request for waiting in batch])
        unanswered = dict(enumerate(batch))
        origins = [waiting.origin for waiting in batch if waiting.origin is not None]
        try:
            async with self._connection.stream(
                self._stub.GenerateMany, request, timeout=self._timeout, origins=origins
            ) as answers:
                async for answer in answers:
                    self._connection.read(lambda message: self._settle(unanswered, message), answer)
        except asyncio.CancelledError:
            for waiting in unanswered.values():
                waiting.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - raised for each caller
            if isinstance(error, CallFailed) and error.code == "UNIMPLEMENTED":
                self._is_offered = False
            if isinstance(error, ServiceUnavailable) or (isinstance(error, CallFailed) and error.timed_out):
                for waiting in unanswered.values():
                    if not waiting.future.done():
                        waiting.future.set_exception(error)
        for waiting in unanswered.values():
            if not waiting.future.done():
                waiting.future.set_result(None)

    def _settle(self, unanswered: dict[int, _Waiting], message: pb.GenerateManyResponse) -> None:
        """Completes the futures of the requests that the message answers, and takes them out of `unanswered`. Raises
        KeyError for any other index, and ValueError for an item without a result."""
        for item in message.items:
            kind = item.WhichOneof("result")
            if kind is None:
                raise ValueError(f"items.index {item.index} has no result")
            future = unanswered.pop(item.index).future
            if future.done():  # its caller was cancelled
                continue
            if kind == "response":
                future.set_result(item.response)
                continue
            error = item_error(item.error, self._connection.endpoint.address, "GenerateMany")
            if isinstance(error, DomainError) and is_for_later(error):
                future.set_result(None)  # Generate waits and tries again
            else:
                future.set_exception(error)


def _batches(waiting: Sequence[_Waiting]) -> Iterator[list[_Waiting]]:
    """Splits by the limits of count and size, in order."""
    batch: list[_Waiting] = []
    size = 0
    for one in waiting:
        size += one.request.ByteSize()
        if batch and (len(batch) == _MAX_BATCH or size > _MAX_BATCH_BYTES):
            yield batch
            batch, size = [], one.request.ByteSize()
        batch.append(one)
    if batch:
        yield batch
