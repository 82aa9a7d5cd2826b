"""Client of `RunService`: what the command line uses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mulligan.common.channel import Connection, Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.experience import Experience
from mulligan.common.experience_wire import experience_from_proto
from mulligan.common.tokens import is_sendable
from mulligan.trainer.activity import Activity
from mulligan.trainer.events import Entry, EvaluationEvent
from mulligan.trainer.folder import RunState
from mulligan.trainer.learner.settings import LearnerInfo, LearnerUse
from mulligan.trainer.learner.wire import info_from_proto
from mulligan.trainer.settings import EvaluationSettings, RunSettings
from mulligan.trainer.v1 import learner_service_pb2 as learner_pb
from mulligan.trainer.v1 import learner_service_pb2_grpc, run_service_pb2_grpc
from mulligan.trainer.v1 import run_service_pb2 as pb
from mulligan.trainer.wire import (
    entry_from_proto,
    evaluation_from_proto,
    fill_with,
    foreign_from_proto,
    settings_to_proto,
    state_from_proto,
)

CALL_SECONDS = 30.0
EVALUATE_SECONDS = 3600.0
WATCH_SECONDS = 30 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run as its trainer tells of it. Where a plug-in that `settings` name is not installed here, they have its
    common settings alone."""

    run_id: str
    state: RunState
    error: str
    settings: RunSettings
    step: int
    created_at: datetime
    train_seconds: float
    folder: str
    paused: str = ""
    activity: Activity = Activity()
    beside: Activity = Activity()


def _credential(answer: pb.StartRunResponse) -> str:
    if answer.credential and not is_sendable(answer.credential):
        raise ValueError("credential: expected at most 4,096 printable ASCII characters without spaces")
    return answer.credential


class RunClient:
    """Starts, stops, watches and lists runs, and evaluates policies. Lists are read page by page.

    `credentials` are those of runs, by id; `start` adds the one that it is given. A call that acts upon a run carries
    its credential, or else that of the endpoint.
    """

    def __init__(self, endpoint: Endpoint):
        self._connection = Connection(endpoint)
        self.credentials: dict[str, str] = {}
        self._stub = run_service_pb2_grpc.RunServiceStub(self._connection.channel)

    async def start(self, run_id: str, settings: RunSettings) -> RunInfo:
        request = pb.StartRunRequest(run_id=run_id, config=settings_to_proto(settings))
        response = await self._of(run_id).call(self._stub.StartRun, request, timeout=CALL_SECONDS)
        if credential := self._connection.read(_credential, response):
            self.credentials[run_id] = credential
        return self._run(response)

    async def get(self, run_id: str) -> RunInfo:
        request = pb.GetRunRequest(run_id=run_id)
        return self._run(await self._connection.call(self._stub.GetRun, request, timeout=CALL_SECONDS))

    async def runs(self) -> list[RunInfo]:
        return await self._connection.list_items(
            self._stub.ListRuns,
            pb.ListRunsRequest(),
            lambda page: [_listed(run) for run in page.runs],
            timeout=CALL_SECONDS,
        )

    async def watch(self, run_id: str, after_event: int = 0) -> AsyncIterator[Entry]:
        """All events after the given one, then new ones until the run ends. Reconnects when the stream breaks."""
        while True:
            await self.get(run_id)  # raises for an unknown run, and waits for a trainer that is down
            request = pb.WatchRunRequest(run_id=run_id, after_event=after_event)
            try:
                async with self._connection.stream(self._stub.WatchRun, request, timeout=WATCH_SECONDS) as responses:
                    async for response in responses:
                        entry = self._connection.read(lambda answer: entry_from_proto(answer.event), response)
                        after_event = entry.number
                        yield entry
                return
            except CallFailed as error:
                if error.code not in ("UNAVAILABLE", "CANCELLED"):
                    raise

    async def stop(self, run_id: str) -> RunInfo:
        request = pb.StopRunRequest(run_id=run_id)
        return self._run(await self._of(run_id).call(self._stub.StopRun, request, timeout=CALL_SECONDS))

    async def resume(self, run_id: str, *, accept_environment: bool = False) -> RunInfo:
        request = pb.ResumeRunRequest(run_id=run_id, accept_environment=accept_environment)
        return self._run(await self._of(run_id).call(self._stub.ResumeRun, request, timeout=CALL_SECONDS))

    async def evaluate(
        self,
        environment: str,
        settings: EvaluationSettings,
        *,
        seed: int = 0,
        max_tokens: int | None = None,
        run_id: str = "",
        policy: str = "",
        on_progress: Callable[[int, int, float | None, str], None] = lambda ended, total, success, protocol: None,
    ) -> tuple[EvaluationEvent, int]:
        """The result, and the policy version that was measured.

        With `run_id`, the run's last checkpoint is published first; otherwise `policy` names a policy of the service.
        `on_progress` gets the number of ended attempts, of all attempts, the share of successes so far, and the label
        of the protocol that plays them, "" before the first. A trainer of the first release tells of no progress and
        knows no protocols: with protocols, CallFailed with UNIMPLEMENTED.
        """
        request = pb.EvaluateRequest(
            environment=environment, seed=seed, max_tokens=max_tokens, run_id=run_id, policy=policy
        )
        fill_with(request.config, settings)
        streamed = pb.StreamEvaluateRequest(request=request)
        answer = pb.EvaluateResponse()
        connection = self._of(run_id)
        try:
            async with connection.stream(self._stub.StreamEvaluate, streamed, timeout=EVALUATE_SECONDS) as parts:
                async for part in parts:
                    success = part.success if part.HasField("success") else None
                    on_progress(part.ended, part.total, success, part.protocol)
                    answer = part.result
        except CallFailed as error:
            if error.code != "UNIMPLEMENTED" or settings.protocols:
                raise
            answer = await connection.call(self._stub.Evaluate, request, timeout=EVALUATE_SECONDS)
        return self._connection.read(_evaluation, answer)

    async def experiences(self, run_id: str, step: int | None = None, limit: int = 10) -> list[Experience]:
        if limit == 0:
            return []
        request = pb.ListExperiencesRequest(run_id=run_id, step=step, page_size=100)
        return await self._connection.list_items(
            self._stub.ListExperiences, request, _experiences, timeout=CALL_SECONDS, limit=limit
        )

    def _of(self, run_id: str) -> Connection:
        """The connection, with the credential of the run if it is known."""
        credential = self.credentials.get(run_id)
        return self._connection.with_run_credential(credential) if credential else self._connection

    def _run(self, response: Any) -> RunInfo:
        return self._connection.read(lambda answer: _info(answer.run), response)

    async def close(self) -> None:
        await self._connection.close()


def _evaluation(answer: pb.EvaluateResponse) -> tuple[EvaluationEvent, int]:
    if not answer.HasField("result"):
        raise ValueError("the evaluation ended without a result")
    return evaluation_from_proto(answer.result), answer.policy_version


class LearnerAdminClient:
    """Lists and deletes the learners of a server. `LearnerClient` trains with one."""

    def __init__(self, endpoint: Endpoint):
        self._connection = Connection(endpoint)
        self._stub = learner_service_pb2_grpc.LearnerServiceStub(self._connection.channel)

    async def list(self) -> tuple[LearnerInfo, ...]:
        request = learner_pb.ListLearnersRequest()
        response = await self._connection.call(self._stub.ListLearners, request, timeout=CALL_SECONDS)
        return self._connection.read(lambda answer: tuple(map(info_from_proto, answer.learners)), response)

    async def use(self, learner_id: str) -> LearnerUse:
        """Whether there is such a learner, or a checkpoint of it."""
        request = learner_pb.GetLearnerRequest(learner_id=learner_id)
        try:
            await self._connection.call(self._stub.GetLearner, request, timeout=CALL_SECONDS)
        except DomainError as error:
            if error.reason is not Reason.UNKNOWN_LEARNER:
                raise
            told = error.metadata.get("has_checkpoints", "")  # servers of earlier releases do not tell
            return {"false": LearnerUse.FREE, "true": LearnerUse.IN_USE}.get(told, LearnerUse.UNTOLD)
        return LearnerUse.IN_USE

    async def delete(self, learner_id: str, owner: str) -> None:
        """An unknown one succeeds. Raises DomainError LEARNER_OWNED: it has another owner."""
        request = learner_pb.DeleteLearnerRequest(learner_id=learner_id, owner=owner)
        await self._connection.call(self._stub.DeleteLearner, request, timeout=CALL_SECONDS)

    async def close(self) -> None:
        await self._connection.close()


def _experiences(response: pb.ListExperiencesResponse) -> list[Experience]:
    return [experience_from_proto(experience) for experience in response.experiences]


def _activity(message: pb.RunActivity) -> Activity:
    return Activity(message.doing, message.done, message.total, message.seconds)


def _listed(run: pb.Run) -> RunInfo:
    """Of a list: settings that cannot be read here hide no other run."""
    try:
        return _info(run)
    except DomainError as error:
        run.error = run.error or f"its settings cannot be read here: {error.message}"
        return _info(run, RunSettings(environment="(unknown)"))


def _info(run: pb.Run, settings: RunSettings | None = None) -> RunInfo:
    return RunInfo(
        run_id=run.run_id,
        state=state_from_proto(run.state),
        error=run.error,
        settings=settings or foreign_from_proto(run.config),
        step=run.step,
        created_at=run.created_at.ToDatetime(),
        train_seconds=run.train_seconds,
        folder=run.folder,
        paused=run.paused,
        activity=_activity(run.activity),
        beside=_activity(run.beside),
    )
