"""What callers are told of a run that failed: its own words, or those of other code, which may quote anything that the
process knows."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from mulligan.common.access import AccessRole
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.tokens import bearer
from mulligan.trainer.evaluation import EvaluationFailed
from mulligan.trainer.learner.settings import LearnerUse
from mulligan.trainer.manager import RunManager
from mulligan.trainer.sampling import ForeignWeights
from mulligan.trainer.servicer import add_to_server
from mulligan.trainer.step import AlgorithmFailed
from mulligan.trainer.v1 import run_service_pb2 as pb
from mulligan.trainer.v1 import run_service_pb2_grpc
from tests.contract.trainer.test_run_credentials import serving, trainer_settings
from tests.support.tokens import token_of
from tests.unit.trainer.test_run import World

SECRET = "sk-0123456789"
INCIDENT = re.compile(r"(\w+), incident ([0-9a-f]{8}): the server's log has it")
LOOKS_ON = (AccessRole.READER, AccessRole.ACTOR)
OWNS = (AccessRole.TRAINER, AccessRole.ADMIN)
Stub = Any


@asynccontextmanager
async def serving_runs(folder: Path, world: World) -> AsyncIterator[tuple[RunManager, Stub]]:
    settings = trainer_settings(folder)
    manager = RunManager(settings.runs_folder, world.run().services)
    admission = settings.admission(world.memory.snapshot, _nobody)
    async with serving(settings, lambda server: add_to_server(server, manager, admission)) as endpoint:
        async with grpc.aio.insecure_channel(endpoint.address) as channel:
            yield manager, run_service_pb2_grpc.RunServiceStub(channel)
        await manager.close()


async def _nobody(learner_id: str) -> LearnerUse:
    return LearnerUse.FREE


async def told(stub: Stub, role: AccessRole) -> set[str]:
    """The errors of the run "run" in all answers that have one."""
    metadata = bearer(token_of(role))
    watched = [one async for one in stub.WatchRun(pb.WatchRunRequest(run_id="run"), metadata=metadata)]
    listed = (await stub.ListRuns(pb.ListRunsRequest(), metadata=metadata)).runs
    found = {one.error for one in listed if one.run_id == "run"}
    found.add((await stub.GetRun(pb.GetRunRequest(run_id="run"), metadata=metadata)).run.error)
    found.add(watched[-1].event.state_changed.error)
    if role in OWNS:
        admin = bearer(token_of(AccessRole.ADMIN))
        found.add((await stub.StopRun(pb.StopRunRequest(run_id="run"), metadata=admin)).run.error)
    return found


def failing(folder: Path, error: Exception) -> World:
    world = World(folder / "runs")

    async def update_weights(*_: object) -> float | None:
        raise error

    world.policy.update_weights = update_weights  # type: ignore[method-assign, assignment]
    return world


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"the key is {SECRET}"),
        KeyError(SECRET),
        PermissionError(13, "not allowed", f"/home/{SECRET}"),
        AlgorithmFailed(f"algorithm 'acme' raised\nValueError: {SECRET}"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_other_code_said_is_for_those_who_may_start_runs(tmp_path: Path, error: Exception) -> None:
    world = failing(tmp_path, error)
    with structlog.testing.capture_logs() as logs:
        async with serving_runs(tmp_path, world) as (manager, stub):
            manager.go_on()
            (seen,) = await told(stub, AccessRole.READER)
            found = INCIDENT.fullmatch(seen)
            assert found is not None and found[1] == type(error).__name__
            for role in LOOKS_ON:
                assert await told(stub, role) == {seen}
            for role in OWNS:
                assert await told(stub, role) == {f"{type(error).__name__}: {error}"}
    (logged,) = [entry for entry in logs if entry["event"] == "run failed"]
    assert (logged["incident"], logged["run_id"], logged["exc_info"]) == (found[2], "run", error)
    async with serving_runs(tmp_path, world) as (_, stub):  # from the files of the run
        assert {role: await told(stub, role) for role in (LOOKS_ON[0], OWNS[0])} == {
            LOOKS_ON[0]: {seen},
            OWNS[0]: {f"{type(error).__name__}: {error}"},
        }


@pytest.mark.parametrize(
    "error",
    [
        DomainError(Reason.CANARY_FAILED, "log-probabilities differ"),
        ForeignWeights("the policy serves version 7"),
        EvaluationFailed("no attempt could be finished"),
        ServiceUnavailable("10.0.0.1:1", 120, "away"),
        CallFailed("10.0.0.1:1", "UpdateWeights", "INTERNAL", "KeyError, incident 01234567"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_the_trainer_says_is_for_all(tmp_path: Path, error: Exception) -> None:
    async with serving_runs(tmp_path, failing(tmp_path, error)) as (manager, stub):
        manager.go_on()
        (seen,) = await told(stub, AccessRole.READER)
        words = error.message if isinstance(error, DomainError) else f"{type(error).__name__}: {error}"
        assert words in seen
        for role in (*LOOKS_ON, *OWNS):
            assert await told(stub, role) == {seen}


async def test_a_run_that_cannot_be_read_tells_those_who_look_on_no_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_runs(tmp_path, World(tmp_path / "runs")) as (manager, stub):

        def broken(run_id: str) -> Any:
            raise RuntimeError(SECRET)

        monkeypatch.setattr(manager, "run", broken)
        for role in LOOKS_ON:
            (listed,) = (await stub.ListRuns(pb.ListRunsRequest(), metadata=bearer(token_of(role)))).runs
            assert INCIDENT.fullmatch(listed.error)
        for role in OWNS:
            (listed,) = (await stub.ListRuns(pb.ListRunsRequest(), metadata=bearer(token_of(role)))).runs
            assert listed.error == f"RuntimeError: {SECRET}"


async def test_a_plug_in_that_cannot_read_its_settings_is_not_quoted_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those settings were read when the run started; the plug-in is another one now. Somebody asks again and again."""
    metadata = bearer(token_of(LOOKS_ON[0]))
    async with serving_runs(tmp_path, World(tmp_path / "runs")) as (_, stub):

        async def seen() -> set[str]:
            """The errors in all answers."""
            listed = [(await stub.ListRuns(pb.ListRunsRequest(), metadata=metadata)).runs[0].error for _ in range(2)]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetRun(pb.GetRunRequest(run_id="run"), metadata=metadata)
            return {*listed, str(caught.value.details())}

        for raised in (RuntimeError, KeyError):

            def broken(*_: object, raised: type[Exception] = raised) -> Any:
                raise raised(SECRET)

            monkeypatch.setattr("mulligan.trainer.folder.RunSettings.model_validate", broken)
            with structlog.testing.capture_logs() as logs:
                told = await seen()
            assert SECRET not in str(told)
            found = {match.groups() for text in told if (match := INCIDENT.search(text))}
            incidents = [entry["incident"] for entry in logs if "incident" in entry]
            assert len(incidents) == 1 and found == {(raised.__name__, incidents[0])}
