"""The client of the environment service; implements the trainer's `EnvironmentPort`.

A unary call costs a few hundred microseconds of Python regardless of its content. So the steps that callers ask for in
one tick of the event loop, or while earlier batches are in flight, are sent together by StepEpisodes. Two batches are
in flight at a time, so that server and client work in parallel. A single step is sent at once. The server answers a
batch within `_FIRST_WAIT_SECONDS`; steps that still run are asked for again in a separate batch, so a slow or hanging
episode delays no other. Steps are exactly-once, so repeating them is safe.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import grpc
import structlog

from mulligan.common.channel import Connection, Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable, invalid_field
from mulligan.common.status import item_error
from mulligan.common.suggest import did_you_mean
from mulligan.common.tasks import cancel, to_its_end
from mulligan.common.tracing import Origin, origin, span
from mulligan.common.types import EnvironmentInfo, EpisodeStep, Outcome, Split, TaskInfo
from mulligan.env.start_queue import StartQueue
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from mulligan.env.wire import info_from_proto, step_from_proto, tasks_from_proto

# steps per batch; in a larger one the cost of the call is below a tenth of the cost of its steps
_MIN_BATCH = 8
_MAX_BATCH = 128
_MAX_BATCH_CHARACTERS = 4 * 2**20  # far below the message limit; a longer action is sent alone
_MAX_IN_FLIGHT = 2
_MAX_CALLS = 64  # concurrent calls other than steps; thousands of starts at once overload a server
_FIRST_WAIT_SECONDS = 0.05
_STILL_RUNS = ("DEADLINE_EXCEEDED", "the step still runs")
_PAGE_SIZE = 1000
_GIVE_UP_SECONDS = 2.0
_CALLS_PER_LEASE = 3  # two may be lost or late
_SHORTEST_WAIT_SECONDS = 0.02
_SPLITS = {Split.TRAIN: pb.SPLIT_TRAIN, Split.TEST: pb.SPLIT_TEST}
R = TypeVar("R")
log = structlog.get_logger()


class EnvClient:
    """The client of one environment server.

    Steps go through a queue that batches them (`_StepQueue`), and starts through another one (`StartQueue`). All other
    calls are unary; starts and they are at most `_MAX_CALLS` at a time. Every call is retried as `Connection.call`
    does. `timeout` limits each call, in seconds; it must be longer than the slowest step.
    """

    def __init__(self, endpoint: Endpoint, *, timeout: float = 90.0, on_outage: Callable[[str], None] | None = None):
        self._connection = Connection(endpoint, on_outage)
        self._stub = pb_grpc.EnvServiceStub(self._connection.channel)
        self._timeout = timeout
        self._places = asyncio.Semaphore(_MAX_CALLS)
        self._steps = _StepQueue(self._connection, self._stub, timeout)
        self._starts = StartQueue(self._connection, self._stub, timeout, self._give_up)

    @property
    def waiting_for(self) -> str:
        """What calls wait for now; "" if none does."""
        return self._connection.waiting_for

    async def list_environments(self) -> list[EnvironmentInfo]:
        request = pb.ListEnvironmentsRequest()
        response = await self._call(self._stub.ListEnvironments, request)
        return [info_from_proto(info) for info in response.environments]

    async def describe(self, environment: str) -> EnvironmentInfo:
        infos = {info.name: info for info in await self.list_environments()}
        if environment not in infos:
            message = f"no environment {environment!r} at {self._connection.endpoint.address}"
            near = did_you_mean(environment, infos)
            raise DomainError(Reason.UNKNOWN_ENVIRONMENT, f"{message}{near}; there are: {', '.join(infos)}")
        return infos[environment]

    async def list_tasks(self, environment: str, split: Split, limit: int) -> list[TaskInfo]:
        """The first `limit` tasks; 0 means all."""
        request = pb.ListTasksRequest(environment=environment, split=_SPLITS[split], page_size=_PAGE_SIZE)
        async with self._places:
            return await self._connection.list_items(
                self._stub.ListTasks, request, tasks_from_proto, timeout=self._timeout, limit=limit
            )

    async def start(self, environment: str, task_id: str, episode_id: str) -> RemoteEpisode:
        request = pb.StartEpisodeRequest(episode_id=episode_id, environment=environment, task_id=task_id)
        again = partial(self._call, self._stub.StartEpisode, request)
        return await self._begin(episode_id, partial(self._starts.put, request), again)

    async def fork(self, episode_id: str, step_index: int, new_episode_id: str) -> RemoteEpisode:
        """Starts another episode in the state of this one after `step_index` steps."""
        request = pb.ForkEpisodeRequest(episode_id=episode_id, step_index=step_index, new_episode_id=new_episode_id)
        begin = partial(self._connection.call, self._stub.ForkEpisode, request, timeout=self._timeout)
        again = partial(self._call, self._stub.ForkEpisode, request)
        return await self._begin(new_episode_id, begin, again, step_index)

    async def _begin(
        self,
        episode_id: str,
        begin: Callable[[], Awaitable[Any]],
        again: Callable[[], Awaitable[Any]],
        next_step: int = 0,
    ) -> RemoteEpisode:
        """`again` repeats the call `begin` later."""
        async with self._places:
            try:
                begun = await begin()
            except asyncio.CancelledError:  # it may have begun all the same, and would take a place during its lease
                await to_its_end(self._give_up(episode_id))
                raise
        return RemoteEpisode(episode_id, self, begun, again, next_step)

    async def _give_up(self, episode_id: str) -> None:
        """Ends an episode that nobody will play, if its server answers soon."""
        request = pb.EndEpisodeRequest(episode_id=episode_id)
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError):  # the second: the channel is closed
            await self._stub.EndEpisode(request, timeout=_GIVE_UP_SECONDS, metadata=self._connection.metadata)

    async def step(self, episode_id: str, step_index: int, action: str) -> EpisodeStep:
        """Plays one step. A repetition with the same action returns the same answer."""
        if not action.isascii():
            try:
                action.encode()
            except ValueError as error:
                raise invalid_field("action", f"text that UTF-8 can carry ({error})") from error
        with span("episode.step", episode_id=episode_id, step_index=step_index):
            answer = await self._steps.put(episode_id, step_index, action)
            return answer or await self.step_alone(episode_id, step_index, action)

    async def step_alone(self, episode_id: str, step_index: int, action: str) -> EpisodeStep:
        """As `step`, but in a unary call, which delays no other step."""
        request = pb.StepEpisodeRequest(episode_id=episode_id, step_index=step_index, action=action)
        return step_from_proto(await self._call(self._stub.StepEpisode, request))

    async def end(self, episode_id: str) -> None:
        request = pb.EndEpisodeRequest(episode_id=episode_id)
        await self._call(self._stub.EndEpisode, request)

    async def _call(self, method: Callable[..., Awaitable[R]], request: Any) -> R:
        async with self._places:
            return await self._connection.call(method, request, timeout=self._timeout)

    async def close(self) -> None:
        await self._steps.close()
        await self._starts.close()
        await self._connection.close()


class RemoteEpisode:
    """A handle of one episode. It counts the steps; a step that failed on the way may be repeated with the same action.

    `observation` is what the agent sees first, `player` is whose turn it is. `begun` is the answer of the call `begin`,
    which started the episode. `end` sends nothing for an episode that is over: it takes no place at the server, which
    forgets it in time.
    """

    def __init__(
        self, episode_id: str, client: EnvClient, begun: Any, begin: Callable[[], Awaitable[Any]], next_step: int = 0
    ):
        self.episode_id = episode_id
        self.observation: str = begun.observation
        self.player: int = begun.player
        self._lease_seconds = begun.lease.seconds + begun.lease.nanos / 1e9
        self._client = client
        self._begun = begun
        self._begin = begin
        self._last_action: str | None = None  # None: no step was answered yet
        self._next_step = next_step
        self._is_over = False
        self._replaced = ""

    async def step(self, action: str) -> EpisodeStep:
        if self._replaced:
            raise DomainError(Reason.UNKNOWN_EPISODE, self._replaced)
        answer = await self._client.step(self.episode_id, self._next_step, action)
        self._next_step += 1
        self._last_action = action
        self._is_over = answer.done and answer.outcome is not Outcome.ENV_ERROR  # the server may not know of it
        self.player = answer.player
        return answer

    async def fork(self, new_episode_id: str) -> RemoteEpisode:
        """A copy of the episode in its present state. Raises DomainError FORK_UNSUPPORTED if `can_fork` is false."""
        return await self._client.fork(self.episode_id, self._next_step, new_episode_id)

    def kept_alive(self) -> AbstractAsyncContextManager[None]:
        """During the block the episode does not expire, however long no step is made."""
        return kept_alive(self.episode_id, self._lease_seconds, self._repeat)

    async def _repeat(self) -> None:
        """Repeats the last answered call, which renews the lease and changes nothing.

        If the server lost the episode before its first step, the call starts a new one. The handle refuses to use that
        unless it shows the same observation.
        """
        if self._is_over:
            return
        if self._last_action is not None:
            await self._client.step_alone(self.episode_id, self._next_step - 1, self._last_action)
            return
        begun = await self._begin()
        if self._last_action is None and (begun.observation, begun.player) != (self.observation, self._begun.player):
            self._replaced = f"episode {self.episode_id!r} was lost: begun again, it shows another observation"
            raise DomainError(Reason.UNKNOWN_EPISODE, self._replaced)

    async def end(self) -> None:
        if not self._is_over:
            await self._client.end(self.episode_id)


@asynccontextmanager
async def kept_alive(
    episode_id: str, lease_seconds: float, repeat: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Calls `repeat` several times per lease during the block, so that an episode does not expire while its agent
    thinks.

    Every call renews a lease and can be repeated, so repeating the last answered call works with servers in any
    language. A failure of `repeat` is only logged: the next step reports what happened to the episode. A
    `lease_seconds` of 0 means unknown, and `repeat` is not called.
    """
    renewing = asyncio.create_task(_renew(episode_id, lease_seconds, repeat)) if lease_seconds > 0 else None
    try:
        yield
    finally:
        if renewing is not None:
            await cancel(renewing)


async def _renew(episode_id: str, lease_seconds: float, repeat: Callable[[], Awaitable[None]]) -> None:
    wait = max(lease_seconds / _CALLS_PER_LEASE, _SHORTEST_WAIT_SECONDS)
    while True:
        await asyncio.sleep(wait)
        try:
            async with asyncio.timeout(lease_seconds):
                await repeat()
        except (CallFailed, ServiceUnavailable, TimeoutError) as error:
            log.warning("a lease was not renewed", episode_id=episode_id, cause=str(error) or "no answer in time")
        except DomainError as error:  # the episode is lost or over
            log.warning("a lease was not renewed, and will not be", episode_id=episode_id, cause=str(error))
            return


_Answer = EpisodeStep | None  # None: to be repeated in a unary call


class _Waiting(NamedTuple):
    future: asyncio.Future[_Answer]
    episode_id: str
    step_index: int
    action: str
    origin: Origin | None


class _StepQueue:
    """Sends single steps in batches.

    `put` adds a step and schedules `_flush` at the end of the tick, which forms at most two batches. `_send` makes the
    calls of a batch and completes the futures of its steps. Steps that still run are asked for again with twice the
    wait, while `_flush` goes on with the next batches. After an error that one step may have caused, each step of the
    batch is repeated in a unary call.
    """

    def __init__(self, connection: Connection, stub: pb_grpc.EnvServiceStub, timeout: float):
        self._connection = connection
        self._stub = stub
        self._timeout = timeout
        self._waiting: deque[_Waiting] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._batches = 0  # in flight, without a first answer yet
        self._travelling = 0  # steps in those batches
        self._flush_is_due = False
        self._was_alone = False

    async def put(self, episode_id: str, step_index: int, action: str) -> _Answer:
        loop = asyncio.get_running_loop()
        item = _Waiting(loop.create_future(), episode_id, step_index, action, origin())
        if self._was_alone and not self._batches and not self._waiting:
            # The last step was alone, so this one probably is, too: send it at once, without a task, which would cost a
            # tenth of a lone step. Other steps of this tick form the second batch.
            await self._send(self._counted([item]))
        else:
            self._waiting.append(item)
            if not self._flush_is_due:
                self._flush_is_due = True
                loop.call_soon(self._flush)  # at the end of this tick
        return await item.future

    async def close(self) -> None:
        await cancel(*self._tasks)

    def _flush(self) -> None:
        self._flush_is_due = False
        self._was_alone = not self._batches and len(self._waiting) == 1
        while self._waiting and self._batches < _MAX_IN_FLIGHT:
            # Equal batches, so that neither side waits for the other.
            share = -(-(len(self._waiting) + self._travelling) // _MAX_IN_FLIGHT)
            batch = _split_off(self._waiting, min(max(share, _MIN_BATCH), _MAX_BATCH))
            if batch:
                task = asyncio.create_task(self._send(self._counted(batch)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _counted(self, batch: list[_Waiting]) -> list[_Waiting]:
        self._batches += 1
        self._travelling += len(batch)
        return batch

    async def _send(self, batch: list[_Waiting]) -> None:
        """Completes all futures of the batch. Steps that still run are asked for again with twice the wait, while the
        next batches go ahead: a slow step delays others of its kind by at most its own duration."""
        try:
            slow = await self._call(batch, _FIRST_WAIT_SECONDS)
        finally:
            self._batches -= 1
            self._travelling -= len(batch)
            if self._waiting and not self._flush_is_due:
                self._flush_is_due = True
                # Flush after the callers that just got answers: their next steps join the next batch.
                asyncio.get_running_loop().call_soon(self._flush)
        wait = waited = _FIRST_WAIT_SECONDS
        while slow:
            wait = min(2 * wait, self._timeout - waited)
            if wait <= 0:
                self._fail(slow, CallFailed(self._connection.endpoint.address, "StepEpisodes", *_STILL_RUNS))
                return
            slow = await self._call(slow, wait)
            waited += wait

    async def _call(self, batch: list[_Waiting], wait: float) -> list[_Waiting]:
        """Completes the futures of the steps that are answered within the wait. Returns the other steps."""
        request = pb.StepEpisodesRequest()
        origins = [item.origin for item in batch if item.origin is not None]
        request.max_wait.nanos = int(wait % 1 * 1e9)
        request.max_wait.seconds = int(wait)
        add = request.steps.add
        for _, episode_id, step_index, action, _ in batch:
            add(episode_id=episode_id, step_index=step_index, action=action)
        try:
            response = await self._connection.call(
                self._stub.StepEpisodes, request, timeout=wait + self._timeout, origins=origins
            )
        except asyncio.CancelledError:
            for item in batch:
                item.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - raised for each caller
            self._fail(batch, error)
            return []
        if len(response.items) != len(batch):
            wrong = f"{len(response.items)} items for {len(batch)} steps"
            self._fail(batch, CallFailed(self._connection.endpoint.address, "StepEpisodes", "INTERNAL", wrong))
            return []
        pairs = zip(batch, response.items, strict=True)
        return [waiting for waiting, item in pairs if not self._settle(waiting.future, item)]

    def _settle(self, future: asyncio.Future[_Answer], item: pb.StepEpisodesResponse.Item) -> bool:
        """Completes the future if the item has a result. Returns whether it is complete."""
        if future.done():  # its caller was cancelled
            return True
        kind = item.WhichOneof("result")
        if kind == "step":
            future.set_result(step_from_proto(item.step))
        elif kind == "error":
            address = self._connection.endpoint.address
            future.set_exception(
                self._connection.read(lambda one: item_error(one, address, "StepEpisodes"), item.error)
            )
        return future.done()

    def _fail(self, batch: list[_Waiting], error: Exception) -> None:
        # One bad step may have caused the error for all: repeat each in a unary call.
        one_by_one = len(batch) > 1 and _is_about_the_content(error)
        for item in batch:
            if not item.future.done():
                item.future.set_result(None) if one_by_one else item.future.set_exception(error)


def _is_about_the_content(error: Exception) -> bool:
    return isinstance(error, DomainError) or (isinstance(error, CallFailed) and not error.timed_out)


def _split_off(waiting: deque[_Waiting], count: int) -> list[_Waiting]:
    """Takes the next batch, within the limits of count and size. Each episode is in it at most once."""
    batch: list[_Waiting] = []
    later: list[_Waiting] = []
    seen: set[str] = set()
    characters = 0
    while waiting and len(batch) < count:
        item = waiting.popleft()
        if item.future.done():  # its caller was cancelled
            continue
        if item.episode_id in seen:
            later.append(item)
            continue
        characters += len(item.action)
        if batch and characters > _MAX_BATCH_CHARACTERS:
            later.append(item)
            break
        batch.append(item)
        seen.add(item.episode_id)
    waiting.extendleft(reversed(later))
    return batch
