"""`RunService` of `mulligan.trainer.v1`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any

import grpc
import structlog

from mulligan.common.errors import DomainError, Reason, ServiceUnavailable, incident, invalid_field
from mulligan.common.experience_wire import experience_to_proto
from mulligan.common.tasks import cancel
from mulligan.common.text import bounded
from mulligan.trainer.activity import Activity
from mulligan.trainer.admission import RunAdmission
from mulligan.trainer.failures import told_of, words_of
from mulligan.trainer.folder import RunState
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences
from mulligan.trainer.manager import RunManager, check_run_id
from mulligan.trainer.metrics import EvaluationProgress
from mulligan.trainer.run import Run
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings
from mulligan.trainer.v1 import run_config_pb2, run_service_pb2_grpc
from mulligan.trainer.v1 import run_service_pb2 as pb
from mulligan.trainer.wire import (
    entry_to_proto,
    evaluation_to_proto,
    settings_from_proto,
    settings_to_proto,
    state_to_proto,
    stored_to_proto,
    timestamp,
    validated,
)

Context = Any
log = structlog.get_logger()
_UNKNOWN = run_config_pb2.RunConfig(environment="(unknown)")  # of a run whose run.json is damaged
_PAGE_BYTES = 32 * 2**20  # of experiences, and of runs: half of the largest message
_LISTED_BYTES = 2**20  # of a run in a list; of one with more, its settings are left out
_ERROR_CHARACTERS = 2**16
_PAGE_TOKEN_LIMIT = 40  # characters: two numbers of 64 bits


def add_to_server(server: grpc.aio.Server, manager: RunManager, admission: RunAdmission | None = None) -> list[str]:
    run_service_pb2_grpc.add_RunServiceServicer_to_server(RunServicer(manager, admission), server)
    return [pb.DESCRIPTOR.services_by_name["RunService"].full_name]


class RunServicer(run_service_pb2_grpc.RunServiceServicer):
    """The runs of a trainer, over gRPC: converts messages and calls the `RunManager`.

    Whoever may look sees all runs; what other code said when a run failed, those who may start runs. What acts upon a
    run needs its credential, as far as the guard asks for any."""

    def __init__(self, manager: RunManager, admission: RunAdmission | None = None):
        self._manager = manager
        self._admission = admission or RunAdmission()
        self._guard = self._admission.guard

    async def StartRun(self, request: pb.StartRunRequest, context: Context) -> pb.StartRunResponse:
        settings = settings_from_proto(request.config)
        check_run_id(request.run_id)  # before anything is looked up by it
        if not self._manager.exists(request.run_id):
            await self._admission.check(context, request.run_id, settings)
        new = not self._manager.exists(request.run_id)  # looked again: another call may have started it meanwhile
        run = self._manager.start(request.run_id, settings)
        credential = self._admission.credential(context, run.run_id, run.settings, new=new)
        return pb.StartRunResponse(run=self._message(run, context), credential=credential)

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=self._message(self._manager.run(request.run_id), context))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        run_ids = self._manager.run_ids()
        start = 0
        if request.page_token:
            if request.page_token not in run_ids:
                raise _bad_page_token()
            start = run_ids.index(request.page_token) + 1
        runs: list[pb.Run] = []
        filled = 0  # bytes
        for run_id in run_ids[start : start + (request.page_size or 100)]:
            listed = self._listed(run_id, context)
            filled += listed.ByteSize()
            if runs and filled > _PAGE_BYTES:
                break
            runs.append(listed)
        more = bool(runs) and runs[-1].run_id != run_ids[-1]
        return pb.ListRunsResponse(runs=runs, next_page_token=runs[-1].run_id if more else "")

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        run = self._manager.run(request.run_id)
        looks_on = not self._guard.may_start_runs(context)
        async for entry in run.events.follow(request.after_event, lambda: self._ended(run)):
            yield pb.WatchRunResponse(event=entry_to_proto(entry, looks_on=looks_on))

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.StopRunResponse:
        self._guard.check_run(context, request.run_id)
        return pb.StopRunResponse(run=self._message(self._manager.stop(request.run_id), context))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.ResumeRunResponse:
        self._guard.check_run(context, request.run_id)
        run = await self._manager.resume(request.run_id, accept_environment=request.accept_environment)
        return pb.ResumeRunResponse(run=self._message(run, context))

    async def Evaluate(self, request: pb.EvaluateRequest, context: Context) -> pb.EvaluateResponse:
        return await self._evaluate(request, context)

    async def StreamEvaluate(
        self, request: pb.StreamEvaluateRequest, context: Context
    ) -> AsyncIterator[pb.StreamEvaluateResponse]:
        changed = asyncio.Event()
        state = pb.StreamEvaluateResponse()

        def tell(progress: EvaluationProgress) -> None:
            state.ended = progress.ended
            state.total = progress.total
            state.protocol = progress.protocol
            state.ClearField("success")
            if progress.success is not None:
                state.success = progress.success
            changed.set()

        evaluation = asyncio.ensure_future(self._evaluate(request.request, context, tell))
        evaluation.add_done_callback(lambda _: changed.set())
        try:
            while not evaluation.done():
                await changed.wait()
                changed.clear()
                if not evaluation.done():
                    yield state
            state.result.CopyFrom(evaluation.result())
            yield state
        finally:
            await cancel(evaluation)

    async def _evaluate(
        self,
        request: pb.EvaluateRequest,
        context: Context,
        tell: Callable[[EvaluationProgress], None] = lambda progress: None,
    ) -> pb.EvaluateResponse:
        if request.run_id:  # its learner is opened, and its weights are served
            self._guard.check_run(context, request.run_id)
        rollout = (
            RolloutSettings(max_tokens=request.max_tokens) if request.HasField("max_tokens") else RolloutSettings()
        )
        settings = validated(EvaluationSettings, request.config)
        threshold = request.success_threshold if request.HasField("success_threshold") else 1.0
        if request.run_id and request.policy:
            raise invalid_field("policy", "nothing beside run_id: the run's own is measured")
        try:
            event, version = await self._manager.evaluate(
                request.environment, settings, rollout, request.seed, threshold, request.policy, request.run_id, tell
            )
        except ServiceUnavailable as error:
            raise DomainError(Reason.SERVICE_UNAVAILABLE, str(error), endpoint=error.endpoint) from error
        return pb.EvaluateResponse(result=evaluation_to_proto(event), policy_version=version)

    async def ListExperiences(self, request: pb.ListExperiencesRequest, context: Context) -> pb.ListExperiencesResponse:
        """The page token is STEP/OFFSET."""
        folder = self._manager.run(request.run_id).folder.journal
        steps = [request.step] if request.HasField("step") else journaled_steps(folder)
        step, offset = _page(request.page_token) if request.page_token else (steps[0] if steps else 0, 0)
        size = request.page_size or 10
        found: list[Any] = []
        filled = 0  # bytes
        for current in (number for number in steps if number >= step and journal_file(folder, number).exists()):
            experiences = await asyncio.to_thread(read_experiences, journal_file(folder, current))
            for place in range(offset if current == step else 0, len(experiences)):
                one = experience_to_proto(experiences[place])
                filled += one.ByteSize()
                if found and (len(found) == size or filled > _PAGE_BYTES):
                    return pb.ListExperiencesResponse(experiences=found, next_page_token=f"{current}/{place}")
                found.append(one)
            if len(found) == size and current != steps[-1]:
                return pb.ListExperiencesResponse(experiences=found, next_page_token=f"{current + 1}/0")
        return pb.ListExperiencesResponse(experiences=found)

    def _ended(self, run: Run) -> bool:
        return self._manager.record(run.run_id).state is not RunState.RUNNING

    def _listed(self, run_id: str, context: Context) -> pb.Run:
        """A run in a list. One that cannot be read stands there with the reason, and hides no other."""
        try:
            found = self._message(self._manager.run(run_id), context)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a run, the others are listed
            return self._unreadable(run_id, error, context)
        if found.ByteSize() > _LISTED_BYTES:
            found.config.CopyFrom(_UNKNOWN)
        return found

    def _unreadable(self, run_id: str, error: Exception, context: Context) -> pb.Run:
        """With the state and the settings of its record, as far as that can be read."""
        if not isinstance(error, DomainError):
            log.error("a run cannot be read", run_id=run_id, incident=incident(error), exc_info=error)
        found = pb.Run(
            run_id=run_id,
            error=self._error(words_of(error), told_of(error), context),
            state=pb.RUN_STATE_FAILED,
            config=_UNKNOWN,
        )
        with contextlib.suppress(Exception):
            record = self._manager.record(run_id)
            found.state = state_to_proto(record.state)
            found.error = self._error(record.error, record.told, context) or found.error
            found.created_at.CopyFrom(timestamp(record.created_at))
            config = stored_to_proto(record.settings)
            if config.ByteSize() <= _LISTED_BYTES:
                found.config.CopyFrom(config)
        return found

    def _error(self, words: str, told: str, context: Context) -> str:
        """What the caller is told of an error."""
        return bounded(words if not told or self._guard.may_start_runs(context) else told, _ERROR_CHARACTERS)

    def _message(self, run: Run, context: Context) -> pb.Run:
        record = self._manager.record(run.run_id)
        now, beside = (
            current.now() if record.state is RunState.RUNNING else Activity() for current in (run.activity, run.beside)
        )
        return pb.Run(
            run_id=record.run_id,
            state=state_to_proto(record.state),
            error=self._error(record.error, record.told, context),
            config=settings_to_proto(run.settings),
            step=run.step,
            created_at=timestamp(record.created_at),
            train_seconds=run.train_seconds,
            folder=str(run.folder.path),
            paused=run.paused,
            activity=pb.RunActivity(**asdict(now)) if now.doing else None,
            beside=pb.RunActivity(**asdict(beside)) if beside.doing else None,
        )


def _page(token: str) -> tuple[int, int]:
    step, _, offset = token.partition("/")
    if not (step.isdecimal() and offset.isdecimal() and len(token) < _PAGE_TOKEN_LIMIT):
        raise _bad_page_token()
    return int(step), int(offset)


def _bad_page_token() -> DomainError:
    return DomainError(Reason.BAD_PAGE_TOKEN, "page_token: expected the next_page_token of an earlier answer")
