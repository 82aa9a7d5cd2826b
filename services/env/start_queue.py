"""The part of the environment's client that sends starts of episodes together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from mulligan.common.channel import Connection, is_for_later
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.gathering import Gathering, cancel_without_callers
from mulligan.common.status import item_error
from mulligan.common.tasks import cancel
from mulligan.common.tracing import Origin, origin, span
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc

_MAX_BATCH = 128  # starts in one call
_GATHER_SECONDS = 0.002
_WAIT_SECONDS = 0.05  # of a call for slow starts; each of them is then waited for in a call of its own


class _WaitingStart(NamedTuple):
    future: asyncio.Future[pb.StartEpisodeResponse | None]  # None: to be asked for in a call of its own
    request: pb.StartEpisodeRequest
    origin: Origin | None


class StartQueue:
    """Sends the starts of one moment in one StartEpisodes call. While other starts are under way, a moment lasts
    `_GATHER_SECONDS`; otherwise it is one tick of the event loop.

    A start that is alone goes by StartEpisode. So does what StartEpisodes did not answer: the server does not have that
    call, it refused all because of one, an episode takes longer to start, or the server asks for a later try. `give_up`
    ends an episode whose caller was cancelled meanwhile.
    """

    def __init__(
        self,
        connection: Connection,
        stub: pb_grpc.EnvServiceStub,
        timeout: float,
        give_up: Callable[[str], Coroutine[Any, Any, None]],
    ):
        self._connection = connection
        self._stub = stub
        self._timeout = timeout  # seconds, of a call
        self._give_up = give_up
        self._gathering: Gathering[_WaitingStart] = Gathering(self._flush, _GATHER_SECONDS, _MAX_BATCH)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_offered = True

    async def put(self, request: pb.StartEpisodeRequest) -> pb.StartEpisodeResponse:
        """Raises as `Connection.call` does."""
        with span("episode.start", episode_id=request.episode_id):
            return await self._put(request)

    async def _put(self, request: pb.StartEpisodeRequest) -> pb.StartEpisodeResponse:
        if self._is_offered:
            waiting = _WaitingStart(asyncio.get_running_loop().create_future(), request, origin())
            self._gathering.put(waiting)
            answer = await waiting.future
            if answer is not None:
                return answer
        with self._gathering.under_way():
            return await self._connection.call(self._stub.StartEpisode, request, timeout=self._timeout)

    async def close(self) -> None:
        for waiting in self._gathering.close():
            waiting.future.cancel()
        await cancel(*self._tasks)

    def _flush(self, waiting: Sequence[_WaitingStart]) -> None:
        by_id: dict[str, _WaitingStart] = {}
        for one in waiting:
            if not one.future.done() and by_id.setdefault(one.request.episode_id, one) is not one:
                one.future.set_result(None)  # an id may appear once; done: its caller was cancelled
        present = list(by_id.values())
        for start in range(0, len(present), _MAX_BATCH):
            batch = present[start : start + _MAX_BATCH]
            if len(batch) == 1:
                batch[0].future.set_result(None)
                continue
            cancel_without_callers(self._begin(self._send(batch)), [one.future for one in batch])

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send(self, batch: Sequence[_WaitingStart]) -> None:
        """Completes all futures of the batch."""
        try:
            with self._gathering.under_way():
                response = await self._call(batch)
            self._settle_all(batch, response)
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - raised for each caller
            self._fail(batch, error)
            return
        pairs = zip(batch, response.items, strict=True)
        for waiting, item in pairs:
            if waiting.future.cancelled() and not item.HasField("error"):
                self._begin(self._give_up(waiting.request.episode_id))

    async def _call(self, batch: Sequence[_WaitingStart]) -> pb.StartEpisodesResponse:
        request = pb.StartEpisodesRequest(starts=[waiting.request for waiting in batch])
        request.max_wait.FromNanoseconds(int(_WAIT_SECONDS * 1e9))
        origins = [waiting.origin for waiting in batch if waiting.origin is not None]
        return await self._connection.call(
            self._stub.StartEpisodes, request, timeout=_WAIT_SECONDS + self._timeout, origins=origins
        )

    def _settle_all(self, batch: Sequence[_WaitingStart], response: pb.StartEpisodesResponse) -> None:
        """Raises CallFailed for an answer that violates the contract."""

        def pairs(answer: pb.StartEpisodesResponse) -> list[tuple[_WaitingStart, pb.StartEpisodesResponse.Item]]:
            if len(answer.items) != len(batch):
                raise ValueError(f"{len(answer.items)} items for {len(batch)} starts")
            return list(zip(batch, answer.items, strict=True))

        for waiting, item in self._connection.read(pairs, response):
            if not waiting.future.done():
                self._settle(waiting.future, item)

    def _settle(
        self, future: asyncio.Future[pb.StartEpisodeResponse | None], item: pb.StartEpisodesResponse.Item
    ) -> None:
        if item.HasField("episode"):
            future.set_result(item.episode)
            return
        if not item.HasField("error"):  # StartEpisode waits for it
            future.set_result(None)
            return
        address = self._connection.endpoint.address
        error = self._connection.read(lambda one: item_error(one, address, "StartEpisodes"), item.error)
        if isinstance(error, DomainError) and is_for_later(error):
            future.set_result(None)  # StartEpisode waits and tries again
        else:
            future.set_exception(error)

    def _fail(self, batch: Sequence[_WaitingStart], error: Exception) -> None:
        if isinstance(error, CallFailed) and error.code == "UNIMPLEMENTED":
            self._is_offered = False
        for_all = isinstance(error, ServiceUnavailable) or (isinstance(error, CallFailed) and error.timed_out)
        for waiting in batch:
            if not waiting.future.done():
                waiting.future.set_exception(error) if for_all else waiting.future.set_result(None)
