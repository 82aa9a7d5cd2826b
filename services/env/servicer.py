"""The gRPC side of the environment service: converts protobuf, and calls the episode table."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import duration_pb2

from mulligan.common.errors import DomainError, invalid_field
from mulligan.common.paging import DEFAULT_PAGE_SIZE, page_position, page_token
from mulligan.common.status import fill_item_error
from mulligan.common.types import EnvironmentInfo, EpisodeStep, PromptSet, Split
from mulligan.common.wire import outcome_to_proto, tools_to_proto
from mulligan.env.calls import StartResult
from mulligan.env.episodes import EpisodeTable, StartAnswer, StartRequest, StepAnswer, StepRequest
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc

SERVICE = "mulligan.env.v1.EnvService"
_SPLITS = {pb.SPLIT_TRAIN: Split.TRAIN, pb.SPLIT_TEST: Split.TEST}
_SPLITS_BACK = {split: number for number, split in _SPLITS.items()}


class EnvServicer(pb_grpc.EnvServiceServicer):
    def __init__(self, table: EpisodeTable):
        self._table = table
        self._lease = duration_pb2.Duration()
        self._lease.FromNanoseconds(int(table.limits.lease_seconds * 1e9))

    async def ListEnvironments(self, request: pb.ListEnvironmentsRequest, context: Any) -> pb.ListEnvironmentsResponse:
        environments = self._table.environments
        return pb.ListEnvironmentsResponse(
            environments=[_info(name, environments[name].info) for name in sorted(environments)]
        )

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        environment = self._table.environment(request.environment)
        split = _SPLITS[request.split]
        listing = (request.environment, split)
        offset = page_position(request.page_token, *listing)
        size = request.page_size or DEFAULT_PAGE_SIZE
        tasks = await self._table.workers.run(lambda: environment.list_tasks(split, offset, size))
        end = offset + len(tasks)
        more = bool(tasks) and end < environment.info.task_counts.get(split, 0)
        return pb.ListTasksResponse(
            tasks=[
                pb.TaskInfo(
                    task_id=task.task_id, split=_SPLITS_BACK[task.split], difficulty=task.difficulty, tags=task.tags
                )
                for task in tasks
            ],
            next_page_token=page_token(end, *listing) if more else "",
        )

    async def StartEpisode(self, request: pb.StartEpisodeRequest, context: Any) -> pb.StartEpisodeResponse:
        return self._begun(await self._table.start(request.episode_id, request.environment, request.task_id))

    async def StartEpisodes(self, request: pb.StartEpisodesRequest, context: Any) -> pb.StartEpisodesResponse:
        starts = [StartRequest(start.episode_id, start.environment, start.task_id) for start in request.starts]
        if len({start.episode_id for start in starts}) < len(starts):
            raise invalid_field("starts.episode_id", "each episode once")
        answers = await self._table.start_all(starts, _max_wait(request))
        return pb.StartEpisodesResponse(items=map(self._start_item, answers))

    def _start_item(self, answer: StartAnswer | None) -> pb.StartEpisodesResponse.Item:
        if answer is None:
            return pb.StartEpisodesResponse.Item(pending=pb.StartPending())
        if isinstance(answer, StartResult):
            return pb.StartEpisodesResponse.Item(episode=self._begun(answer))
        item = pb.StartEpisodesResponse.Item()
        fill_item_error(item.error, answer)
        return item

    def _begun(self, begun: StartResult) -> pb.StartEpisodeResponse:
        return pb.StartEpisodeResponse(observation=begun.observation, lease=self._lease, player=begun.player)

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        (answer,) = await self._table.step([_step_request(request)])
        if isinstance(answer, DomainError):
            raise answer
        assert answer is not None  # without a time limit there is an answer
        return _step(answer)

    async def StepEpisodes(self, request: pb.StepEpisodesRequest, context: Any) -> pb.StepEpisodesResponse:
        steps = [_step_request(step) for step in request.steps]
        if len({step.episode_id for step in steps}) < len(steps):
            raise invalid_field("steps.episode_id", "each episode once")
        response = pb.StepEpisodesResponse()
        for answer in await self._table.step(steps, _max_wait(request)):
            _fill_item(response.items.add(), answer)
        return response

    async def ForkEpisode(self, request: pb.ForkEpisodeRequest, context: Any) -> pb.ForkEpisodeResponse:
        begun = await self._table.fork(request.episode_id, request.step_index, request.new_episode_id)
        return pb.ForkEpisodeResponse(observation=begun.observation, lease=self._lease, player=begun.player)

    async def EndEpisode(self, request: pb.EndEpisodeRequest, context: Any) -> pb.EndEpisodeResponse:
        self._table.end(request.episode_id)
        return pb.EndEpisodeResponse()


def add_to_server(server: grpc.aio.Server, table: EpisodeTable) -> list[str]:
    pb_grpc.add_EnvServiceServicer_to_server(EnvServicer(table), server)
    return [SERVICE]


def _max_wait(request: pb.StartEpisodesRequest | pb.StepEpisodesRequest) -> float | None:
    """In seconds; None to wait for all."""
    return request.max_wait.ToNanoseconds() / 1e9 if request.HasField("max_wait") else None


def _step_request(request: pb.StepEpisodeRequest) -> StepRequest:
    return StepRequest(request.episode_id, request.step_index, request.action)


def _step(answer: EpisodeStep) -> pb.StepEpisodeResponse:
    step = pb.StepEpisodeResponse()
    _fill_step(step, answer)
    return step


def _fill_step(step: pb.StepEpisodeResponse, answer: EpisodeStep) -> None:
    """Fills a message in place and sets only fields with a value. Constructors take four times as long, which shows in
    batches."""
    step.observation = answer.observation
    step.action = answer.action
    step.done = answer.done
    if answer.reward is not None:
        step.reward = answer.reward
    if answer.done:
        step.outcome = outcome_to_proto(answer.outcome)
        step.feedback = answer.feedback
        step.error = answer.error
    if answer.tool:
        step.tool = answer.tool
    if answer.player:
        step.player = answer.player
    if answer.rewards:
        step.rewards.extend(answer.rewards)


def _fill_item(item: pb.StepEpisodesResponse.Item, answer: StepAnswer | None) -> None:
    if answer is None:
        item.pending.SetInParent()
    elif isinstance(answer, EpisodeStep):
        _fill_step(item.step, answer)
    else:
        fill_item_error(item.error, answer)


def _info(name: str, info: EnvironmentInfo) -> pb.EnvironmentInfo:
    return pb.EnvironmentInfo(
        name=name,
        description=info.description,
        prompts=_prompts(info.prompts),
        max_steps=info.max_steps,
        max_reward=info.max_reward,
        deterministic=info.deterministic,
        train_task_count=info.task_counts.get(Split.TRAIN, 0),
        test_task_count=info.task_counts.get(Split.TEST, 0),
        tools=tools_to_proto(info.tools),
        unavailable=info.unavailable,
        can_fork=info.can_fork,
        player_count=info.player_count,
    )


def _prompts(prompts: PromptSet) -> pb.PromptSet:
    return pb.PromptSet(
        solver=prompts.solver,
        action_reminder=prompts.action_reminder,
        reflection_system=prompts.reflection_system,
        reflection=prompts.reflection,
        memory_empty=prompts.memory_empty,
        trace_turn=prompts.trace_turn,
        retry=prompts.retry,
        try_again=prompts.try_again,
        reflection_open=prompts.reflection_open,
        reflection_close=prompts.reflection_close,
    )
