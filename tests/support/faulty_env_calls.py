"""Faults in descriptions, lists, starts, ends, batches and forks."""

from __future__ import annotations

from typing import Any, ClassVar
from uuid import uuid4

from mulligan.common.errors import DomainError, Reason
from mulligan.env.v1 import env_service_pb2 as pb
from tests.support.faulty_env import DICE, Faulty, kinds


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


class UnshownChoices(Faulty):
    title = "tags that evaluations read have the values that the contract names"
    tags: ClassVar = {"choices": "2"}

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        answer = await super().ListTasks(request, context)
        for task in answer.tasks:
            task.tags.update(self.tags)
        return answer


class UnknownAnswerable(UnshownChoices):
    tags: ClassVar = {"answerable": "no"}


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
    title = "a repeated item returns the stored answer; an item that is not done within max_wait is pending"

    async def StepEpisodes(self, request: pb.StepEpisodesRequest, context: Any) -> pb.StepEpisodesResponse:
        await super().StepEpisodes(request, context)
        pending = pb.StepEpisodesResponse.Item(pending=pb.StepPending())
        return pb.StepEpisodesResponse(items=[pending for _ in request.steps])


class DuplicatesInABatch(Faulty):
    title = "a batch in which an episode appears twice is INVALID_ARGUMENT INVALID_FIELD"

    async def StepEpisodes(self, request: pb.StepEpisodesRequest, context: Any) -> pb.StepEpisodesResponse:
        items: list[pb.StepEpisodesResponse.Item] = []
        for step in request.steps:
            items += (await super().StepEpisodes(pb.StepEpisodesRequest(steps=[step]), context)).items
        return pb.StepEpisodesResponse(items=items)


class StartsOutOfOrder(Faulty):
    title = "items come in the order of the request, each with its episode or its error"

    async def StartEpisodes(self, request: pb.StartEpisodesRequest, context: Any) -> pb.StartEpisodesResponse:
        answer = await super().StartEpisodes(request, context)
        return pb.StartEpisodesResponse(items=[*answer.items[1:], answer.items[0]])


class StartsAllOrNothing(Faulty):
    title = "items come in the order of the request, each with its episode or its error"

    async def StartEpisodes(self, request: pb.StartEpisodesRequest, context: Any) -> pb.StartEpisodesResponse:
        answer = await super().StartEpisodes(request, context)
        for item in answer.items:
            if item.HasField("error"):
                raise DomainError(Reason(item.error.reason), item.error.message)
        return answer


class StartsInTurns(Faulty):
    title = "each item is the episode that StartEpisode gives under that id, and it can be played"

    async def StartEpisodes(self, request: pb.StartEpisodesRequest, context: Any) -> pb.StartEpisodesResponse:
        answer = await super().StartEpisodes(request, context)
        for item in answer.items:
            item.episode.observation += " of a batch"
        return answer


class StartsForEver(Faulty):
    title = "a repeated item returns the first answer; an item that is not done within max_wait is pending"

    async def StartEpisodes(self, request: pb.StartEpisodesRequest, context: Any) -> pb.StartEpisodesResponse:
        await super().StartEpisodes(request, context)
        pending = pb.StartEpisodesResponse.Item(pending=pb.StartPending())
        return pb.StartEpisodesResponse(items=[pending for _ in request.starts])


class SharesIdsInABatch(Faulty):
    title = "an id that is in use for another task is EPISODE_CONFLICT for its item alone"

    async def StartEpisodes(self, request: pb.StartEpisodesRequest, context: Any) -> pb.StartEpisodesResponse:
        for start in request.starts:
            record = self._table._live.get(start.episode_id)
            if record is not None:
                start.task_id = record.task_id
        return await super().StartEpisodes(request, context)


class StartsTwiceInABatch(Faulty):
    title = "a batch in which an id appears twice is INVALID_ARGUMENT INVALID_FIELD"

    async def StartEpisodes(self, request: pb.StartEpisodesRequest, context: Any) -> pb.StartEpisodesResponse:
        items: list[pb.StartEpisodesResponse.Item] = []
        for start in request.starts:
            items += (await super().StartEpisodes(pb.StartEpisodesRequest(starts=[start]), context)).items
        return pb.StartEpisodesResponse(items=items)


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
    title = "limits, counts and players are valid numbers"

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


KINDS = kinds(__name__)
