"""Faults in how steps are played and answered."""

from __future__ import annotations

from collections import Counter
from typing import Any
from uuid import uuid4

import grpc

from mulligan.common.errors import DomainError, Reason
from mulligan.common.v1 import outcome_pb2
from mulligan.env.episodes import EpisodeTable
from mulligan.env.v1 import env_service_pb2 as pb
from tests.support.faulty_env import Faulty, kinds


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
        step.outcome = outcome_pb2.OUTCOME_ENV_ERROR
        step.done = True
        step.error = "the die fell off the table"
        return step


class ShortMessages(Faulty):
    title = "an action of a megabyte is an action"

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        if len(request.action) > 100_000:
            raise DomainError(Reason.INVALID_FIELD, "too long", field="action", expected="less")
        return await super().StepEpisode(request, context)


KINDS = kinds(__name__)
