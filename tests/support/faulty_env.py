"""Environment servers with a planted violation each: what the conformance suite must notice.

They serve the dice of `dice.py` with our own servicer; a fault changes what comes in or goes out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar
from uuid import uuid4

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from mulligan.common.v1 import outcome_pb2
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc

from services.common.errors import DomainError, Reason
from services.common.server import RequestInterceptor
from services.env.episodes import EpisodeTable, Limits
from services.env.load import load_or_explain
from services.env.servicer import EnvServicer
from services.env.workers import WorkerPool

DICE = {"kind": "tests.support.dice"}


class Faulty(EnvServicer):
    """`title` is that of the check that must notice."""

    title = ""
    table: ClassVar[dict[str, Any]] = DICE
    lease_seconds = 600.0

    def said(self, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        """A step's answer, as it leaves the server."""
        return step

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        return self.said(await super().StepEpisode(request, context))

    async def StepEpisodes(self, request: pb.StepEpisodesRequest, context: Any) -> pb.StepEpisodesResponse:
        answer = await super().StepEpisodes(request, context)
        for item in answer.items:
            if item.HasField("step"):
                item.step.CopyFrom(self.said(item.step))
        return answer

    def told(self, info: pb.EnvironmentInfo) -> None:
        """Changes what an environment says of itself."""

    async def ListEnvironments(self, request: pb.ListEnvironmentsRequest, context: Any) -> pb.ListEnvironmentsResponse:
        answer = await super().ListEnvironments(request, context)
        for info in answer.environments:
            self.told(info)
        return answer


class NoFault(Faulty):
    pass


class ForgetsTheIndex(Faulty):
    title = "a repeated step returns the stored answer"

    def __init__(self, table: EpisodeTable) -> None:
        super().__init__(table)
        self._played: Counter[str] = Counter()

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        request.step_index = self._played[request.episode_id]
        self._played[request.episode_id] += 1
        return await super().StepEpisode(request, context)


class SkipsAreFine(ForgetsTheIndex):
    title = "a skipped step is FAILED_PRECONDITION STEP_SKIPPED, with next_step_index"


class PlaysBehindTheBack(Faulty):
    """The stored answer comes back, but the environment has moved on."""

    title = "a repeated step is not played again: the episode goes on as if it had come once"

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        record = self._table._live.get(request.episode_id)
        if record is not None and request.step_index < len(record.answers) and record.episode is not None:
            record.episode.step(request.action)
        return await super().StepEpisode(request, context)


class AnyActionRepeats(Faulty):
    title = "an index that was played with another action is FAILED_PRECONDITION STEP_CONFLICT"

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        record = self._table._live.get(request.episode_id) or self._table._finished.get(request.episode_id)
        if record is not None and request.step_index < len(record.answers):
            return pb.StepEpisodeResponse(observation=record.answers[request.step_index].observation, reward=0.0)
        return await super().StepEpisode(request, context)


class WrongCode(Faulty):
    title = "a step of an episode that was never started is NOT_FOUND UNKNOWN_EPISODE"

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        try:
            return await super().StepEpisode(request, context)
        except DomainError as error:
            raise DomainError(Reason.UNKNOWN_ENVIRONMENT, error.message) from None


class NoErrorInfo(Faulty):
    title = "after its end an episode is FAILED_PRECONDITION EPISODE_FINISHED, its answers repeatable"

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> Any:
        try:
            return await super().StepEpisode(request, context)
        except DomainError as error:
            await context.abort(grpc.StatusCode[error.code], error.message)


class NoMetadata(Faulty):
    title = "after steps, next_step_index is how many there were, and the next step is played"

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        try:
            return await super().StepEpisode(request, context)
        except DomainError as error:
            error.metadata = {}
            raise


class ForgetsTheFinished(Faulty):
    title = "after its end an episode is FAILED_PRECONDITION EPISODE_FINISHED, its answers repeatable"

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        step = await super().StepEpisode(request, context)
        if step.done:
            self._table.end(request.episode_id)
        return step


class LeaksFeedback(Faulty):
    title = "feedback comes with the last step only, an error with a failed one only"

    def said(self, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        step.feedback = step.feedback or "warm"
        return step


class NoOutcome(Faulty):
    title = "the last step has an outcome, and no other"

    def said(self, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        step.outcome = outcome_pb2.OUTCOME_UNSPECIFIED
        return step


class NoReward(Faulty):
    title = "each step has a reward, and together they are at most max_reward"

    def said(self, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        if not step.reward:
            step.ClearField("reward")
        return step


class TooMuchReward(NoReward):
    def said(self, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        step.reward += 0.5
        return step


class RewardsOfOne(Faulty):
    title = "there are as many rewards as players, none where there is one, and players are in range"

    def said(self, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        step.rewards.append(step.reward)
        return step


class ToolOfNobody(Faulty):
    title = "a tool that answers is one that the environment lists"

    def said(self, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        step.tool = "abacus"
        return step


class EndsLate(Faulty):
    title = "an episode ends by itself as COMPLETED, or after max_steps steps as TRUNCATED"

    def told(self, info: pb.EnvironmentInfo) -> None:
        info.max_steps -= 1


class NeverTheSame(Faulty):
    title = "the same task and actions lead to the same answers, in a deterministic environment"

    def said(self, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        step.observation += f" {uuid4()}"
        return step


class Breakable(Faulty):
    title = "random and hostile actions break neither an episode nor the server"

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        if "\x00" in request.action:
            raise RuntimeError("no strings with a zero in them")
        return await super().StepEpisode(request, context)


class FailureWithReward(Faulty):
    title = "a step that failed has no reward, is the last, and says what went wrong"

    def said(self, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        step.outcome, step.done, step.error = outcome_pb2.OUTCOME_ENV_ERROR, True, "the die fell off the table"
        return step


class ShortMessages(Faulty):
    title = "an action of a megabyte is an action"

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        if len(request.action) > 100_000:
            raise DomainError(Reason.INVALID_FIELD, "too long", field="action", expected="less")
        return await super().StepEpisode(request, context)


class StartsAnew(Faulty):
    title = "a repeated start returns the first answer, also while it runs and after a step"

    async def StartEpisode(self, request: pb.StartEpisodeRequest, context: Any) -> pb.StartEpisodeResponse:
        answer = await super().StartEpisode(request, context)
        record = self._table._live[request.episode_id]
        if record.answers:
            answer.observation = record.answers[-1].observation
        return answer


class StartsTwice(Faulty):
    title = "starts of one id that come at the same time make one episode"

    async def StartEpisode(self, request: pb.StartEpisodeRequest, context: Any) -> pb.StartEpisodeResponse:
        answer = await super().StartEpisode(request, context)
        answer.observation += f" {uuid4()}"
        return answer


class SharesIds(Faulty):
    title = "an id that is in use for another task is ALREADY_EXISTS EPISODE_CONFLICT"

    async def StartEpisode(self, request: pb.StartEpisodeRequest, context: Any) -> pb.StartEpisodeResponse:
        record = self._table._live.get(request.episode_id)
        if record is not None:
            request.task_id = record.task_id
        return await super().StartEpisode(request, context)


class AnyTask(Faulty):
    title = "an unknown task is NOT_FOUND UNKNOWN_TASK, and the episode's id stays free"

    async def StartEpisode(self, request: pb.StartEpisodeRequest, context: Any) -> pb.StartEpisodeResponse:
        try:
            return await super().StartEpisode(request, context)
        except DomainError as error:
            if error.reason is not Reason.UNKNOWN_TASK:
                raise
            request.task_id = "train/0"
            return await super().StartEpisode(request, context)


class NoLease(Faulty):
    title = "tasks that are listed can be started, with a lease and a player"

    async def StartEpisode(self, request: pb.StartEpisodeRequest, context: Any) -> pb.StartEpisodeResponse:
        answer = await super().StartEpisode(request, context)
        answer.ClearField("lease")
        return answer


class SilentlyUnavailable(Faulty):
    title = "an environment that is unavailable says so: FAILED_PRECONDITION ENVIRONMENT_UNAVAILABLE"
    table: ClassVar = {"kind": "tests.support.environments", "missing": "ice"}

    async def StartEpisode(self, request: pb.StartEpisodeRequest, context: Any) -> pb.StartEpisodeResponse:
        raise DomainError(Reason.UNKNOWN_TASK, "no such task")


class NeverExpires(Faulty):
    title = "an episode that is idle for longer than its lease is NOT_FOUND EPISODE_EXPIRED"

    async def StartEpisode(self, request: pb.StartEpisodeRequest, context: Any) -> pb.StartEpisodeResponse:
        answer = await super().StartEpisode(request, context)
        answer.lease.FromMilliseconds(10)
        return answer


class EndsOnce(Faulty):
    title = "ending twice succeeds, and a step after the end is NOT_FOUND UNKNOWN_EPISODE"

    async def EndEpisode(self, request: pb.EndEpisodeRequest, context: Any) -> pb.EndEpisodeResponse:
        if request.episode_id not in self._table._live:
            raise DomainError(Reason.UNKNOWN_EPISODE, "gone")
        return await super().EndEpisode(request, context)


class NeverEnds(Faulty):
    title = "an episode that was ended is gone for StepEpisodes, too"

    async def EndEpisode(self, request: pb.EndEpisodeRequest, context: Any) -> pb.EndEpisodeResponse:
        return pb.EndEpisodeResponse()


class WrongCount(Faulty):
    title = "page by page it lists as many tasks as it counts, each in its split"

    def told(self, info: pb.EnvironmentInfo) -> None:
        info.test_task_count += 1


class SplitsOverlap(Faulty):
    title = "no task is listed twice, and none in both splits"
    table = DICE | {"fault": "both-splits"}


class EndlessPages(Faulty):
    title = "page by page it lists as many tasks as it counts, each in its split"

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        page = pb.ListTasksRequest(environment=request.environment, split=request.split)
        answer = await super().ListTasks(page, context)
        answer.next_page_token = "more"
        return answer


class PagesOfAnySize(Faulty):
    title = "pages of any size list the same tasks in the same order"

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        if not request.page_token:
            request.page_size = 0
        return await super().ListTasks(request, context)


class AnyPageToken(Faulty):
    title = "a page token that it did not make is INVALID_ARGUMENT BAD_PAGE_TOKEN"

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        try:
            return await super().ListTasks(request, context)
        except DomainError:
            request.page_token = ""
            return await super().ListTasks(request, context)


class BatchOutOfOrder(Faulty):
    title = "items come in the order of the request, each with its result or its error"

    async def StepEpisodes(self, request: pb.StepEpisodesRequest, context: Any) -> pb.StepEpisodesResponse:
        answer = await super().StepEpisodes(request, context)
        return pb.StepEpisodesResponse(items=reversed(answer.items))


class BatchAllOrNothing(Faulty):
    title = "items come in the order of the request, each with its result or its error"

    async def StepEpisodes(self, request: pb.StepEpisodesRequest, context: Any) -> pb.StepEpisodesResponse:
        answer = await super().StepEpisodes(request, context)
        for item in answer.items:
            if item.HasField("error"):
                raise DomainError(Reason(item.error.reason), item.error.message)
        return answer


class PendingForEver(Faulty):
    title = "a repeated item returns the stored answer, and one without a place in time is pending"

    async def StepEpisodes(self, request: pb.StepEpisodesRequest, context: Any) -> pb.StepEpisodesResponse:
        await super().StepEpisodes(request, context)
        pending = pb.StepEpisodesResponse.Item(pending=pb.StepPending())
        return pb.StepEpisodesResponse(items=[pending for _ in request.steps])


class DuplicatesInABatch(Faulty):
    title = "a batch in which an episode appears twice is INVALID_ARGUMENT INVALID_FIELD"

    async def StepEpisodes(self, request: pb.StepEpisodesRequest, context: Any) -> pb.StepEpisodesResponse:
        items = []
        for step in request.steps:
            items += (await super().StepEpisodes(pb.StepEpisodesRequest(steps=[step]), context)).items
        return pb.StepEpisodesResponse(items=items)


class ForkOfNow(Faulty):
    title = "a fork after fewer or more steps than were played, or after the end, is refused"

    async def ForkEpisode(self, request: pb.ForkEpisodeRequest, context: Any) -> pb.ForkEpisodeResponse:
        record = self._table._live.get(request.episode_id)
        if record is not None:
            request.step_index = len(record.answers)
        return await super().ForkEpisode(request, context)


class ForkBlank(Faulty):
    title = "a copy has the steps that were played before, and they are repeatable in it"

    async def ForkEpisode(self, request: pb.ForkEpisodeRequest, context: Any) -> pb.ForkEpisodeResponse:
        answer = await super().ForkEpisode(request, context)
        answer.ClearField("observation")
        return answer


class ForkShares(Faulty):
    title = "a copy is independent: what is played in one changes nothing in the other"
    table = DICE | {"fault": "fork-shares"}


class ForkInexact(Faulty):
    title = "from there on both answer the same actions alike, in a deterministic environment"
    table = DICE | {"fault": "fork-forgets"}


class ForkUnannounced(Faulty):
    title = "an environment that cannot fork says so: UNIMPLEMENTED FORK_UNSUPPORTED"

    def told(self, info: pb.EnvironmentInfo) -> None:
        info.can_fork = False


class NoPrompts(Faulty):
    title = "each prompt is there and has its placeholders"

    def told(self, info: pb.EnvironmentInfo) -> None:
        info.prompts.trace_turn = "what was seen and done"


class NoPlayers(Faulty):
    title = "limits, counts and players are numbers that make sense"

    def told(self, info: pb.EnvironmentInfo) -> None:
        info.player_count = 0


class ToolWithoutSchema(Faulty):
    title = "tools have a name and a JSON schema of an object"

    def told(self, info: pb.EnvironmentInfo) -> None:
        info.tools.add(name="search", parameters="query: str")


class TwiceTheSame(Faulty):
    title = "each environment is listed once, under a name"

    async def ListEnvironments(self, request: pb.ListEnvironmentsRequest, context: Any) -> pb.ListEnvironmentsResponse:
        answer = await super().ListEnvironments(request, context)
        return pb.ListEnvironmentsResponse(environments=[*answer.environments, *answer.environments])


def kinds(base: type[Faulty] = Faulty) -> list[type[Faulty]]:
    """All that have a fault."""
    found = [kind for sub in base.__subclasses__() for kind in (sub, *kinds(sub))]
    return [kind for kind in found if kind.title]


@asynccontextmanager
async def served(kind: type[Faulty] = NoFault, *, guarded: bool = True, healthy: bool = True) -> AsyncIterator[str]:
    """The address of a server in this process. Without `guarded` it checks no fields, as a careless one would."""
    workers = WorkerPool(4, 30.0, 4)
    environment = load_or_explain("dice", kind.table)
    table = EpisodeTable({"dice": environment}, workers, Limits(lease_seconds=kind.lease_seconds))
    server = grpc.aio.server(interceptors=[RequestInterceptor({})] if guarded else [])
    pb_grpc.add_EnvServiceServicer_to_server(kind(table), server)
    status = health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
    checks = health.aio.HealthServicer()
    await checks.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(1.0)
    workers.close()
