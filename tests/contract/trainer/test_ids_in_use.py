"""The id of a new run is free at the servers of learners that its credential would be good for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.access import AccessRole
from mulligan.common.errors import DomainError, Reason
from mulligan.common.run_credentials import RunGrant
from mulligan.common.tokens import RUN_CREDENTIAL, bearer
from mulligan.trainer.__main__ import _learner_use
from mulligan.trainer.client import LearnerAdminClient
from mulligan.trainer.learner.servicer import LearnerServicer
from mulligan.trainer.learner.servicer import add_to_server as add_learners
from mulligan.trainer.learner.settings import LearnerUse
from mulligan.trainer.manager import RunManager
from mulligan.trainer.servicer import add_to_server as add_runs
from mulligan.trainer.v1 import learner_service_pb2 as learner_pb
from mulligan.trainer.v1 import run_service_pb2 as pb
from mulligan.trainer.v1 import run_service_pb2_grpc
from mulligan.trainer.wire import settings_to_proto
from tests.contract.trainer.test_run_credentials import refused, serving, trainer_settings
from tests.support.tokens import token_of
from tests.unit.trainer.test_run import World


class FirstRelease(LearnerServicer):
    """Tells nothing of checkpoints."""

    async def GetLearner(self, request: learner_pb.GetLearnerRequest, context: Any) -> learner_pb.GetLearnerResponse:
        try:
            return await super().GetLearner(request, context)
        except DomainError as error:
            error.metadata.pop("has_checkpoints")
            raise


async def empty(scope: str) -> int:
    """The version of a scope without entries."""
    return 0


def checkpoint(folder: Path, learner_id: str) -> None:
    (folder / "checkpoints" / learner_id / "step-1").mkdir(parents=True)


class Start:
    """Starts runs at a trainer, with or without the credential for the id."""

    def __init__(self, stub: run_service_pb2_grpc.RunServiceStub, config: Any, sign: Callable[[str], str]):
        self.stub = stub
        self.config = config
        self.sign = sign

    async def __call__(self, run_id: str, *, owns: bool = False) -> pb.StartRunResponse:
        own = ((RUN_CREDENTIAL, self.sign(run_id)),) if owns else ()
        request = pb.StartRunRequest(run_id=run_id, config=self.config)
        return await self.stub.StartRun(request, metadata=(*bearer(token_of(AccessRole.TRAINER)), *own))

    async def ended(self, run_id: str) -> None:
        watched = self.stub.WatchRun(pb.WatchRunRequest(run_id=run_id), metadata=bearer(token_of(AccessRole.READER)))
        async for _ in watched:
            pass


@asynccontextmanager
async def trainers(folder: Path, kind: type[LearnerServicer], *, another: bool = True) -> AsyncIterator[Start]:
    """A trainer whose runs use the learners of `another` one, which is of this kind, or its own."""
    there = trainer_settings(folder / "there")
    theirs = kind(there.learner, guard=there.guard)
    async with serving(there, lambda server: add_learners(server, theirs)) as endpoint:
        token_file = folder / "token"
        token_file.write_text(token_of(AccessRole.TRAINER))
        token_file.chmod(0o600)
        chosen = {"learner_address": endpoint.address, "learner_token_file": token_file} if another else {}
        settings = trainer_settings(folder / "here", **chosen)
        own = LearnerServicer(settings.learner, guard=settings.guard)
        world = World(settings.runs_folder)
        manager = RunManager(settings.runs_folder, world.run().services)
        keys = settings.keys
        assert keys is not None
        admission = settings.admission(empty, partial(_learner_use, settings, own))
        async with (
            serving(settings, lambda server: add_runs(server, manager, admission)) as at,
            grpc.aio.insecure_channel(at.address) as channel,
        ):
            stub = run_service_pb2_grpc.RunServiceStub(channel)
            config = settings_to_proto(world.folder.settings().model_copy(update={"steps": 1}))
            yield Start(stub, config, lambda run_id: keys.sign(RunGrant(run_id, (run_id,)), 60))
        await manager.close()
        await own.close()
    await theirs.close()


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()


@pytest.mark.parametrize(("place", "another"), [("there", True), ("here", True), ("here", False)])
async def test_a_new_run_does_not_get_the_checkpoints_of_others(tmp_path: Path, place: str, another: bool) -> None:
    """There is no such learner now: its loop ended, or its server was started again."""
    checkpoint(tmp_path / place, "theirs")
    async with trainers(tmp_path, LearnerServicer, another=another) as start:
        error = await refused(start("theirs"))
        assert error.metadata == {"learner_id": "theirs"}
        assert "there is such a learner, or a checkpoint of it already" in error.message
        assert (await start("theirs", owns=True)).credential
        await start.ended("theirs")
        assert (await start("free")).credential


async def test_where_the_server_does_not_tell_a_new_run_needs_the_credential(tmp_path: Path) -> None:
    async with trainers(tmp_path, FirstRelease) as start:
        error = await refused(start("new"))
        assert error.metadata == {"learner_id": "new"}
        assert "learner_address does not say whether it has checkpoints with this id" in error.message
        assert "`mulligan token` prints one" in error.message
        assert (await start("new", owns=True)).credential


async def test_a_server_tells_of_checkpoints_below_its_folder_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path / "there", "theirs")
    settings = trainer_settings(tmp_path / "there")
    servicer = LearnerServicer(settings.learner, guard=settings.guard)
    async with serving(settings, lambda server: add_learners(server, servicer)) as endpoint:
        client = LearnerAdminClient(endpoint)
        assert await client.use("theirs") is LearnerUse.IN_USE
        for name in ("others", "theirs/step-1", "../checkpoints", ".", "..", "", "/etc", "x" * 300, "\x00"):
            assert await client.use(name) is LearnerUse.FREE, name
        await client.close()
    await servicer.close()


async def test_nobody_can_say_while_the_server_is_away(tmp_path: Path) -> None:
    settings = trainer_settings(tmp_path / "here", learner_address="127.0.0.1:1", outage_seconds=0.1)
    own = LearnerServicer(settings.learner, guard=settings.guard)
    admission = settings.admission(empty, partial(_learner_use, settings, own))
    assert admission.in_use is not None
    with pytest.raises(DomainError) as caught:
        await admission.in_use.of_learner("new")
    assert (caught.value.reason, caught.value.metadata) == (Reason.SERVICE_UNAVAILABLE, {"endpoint": "learner"})
    await own.close()
