"""A learner is used by callers with the credential of its run alone. StartRun answers one to whom started the run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.cli import connection, run_credentials, stop, train
from mulligan.common.access import AccessRole
from mulligan.common.channel import Endpoint
from mulligan.common.errors import Code, DomainError, Reason, ServiceUnavailable
from mulligan.common.run_credentials import RunGrant, RunKeys
from mulligan.common.server import RequestInterceptor
from mulligan.common.status import from_rpc_error
from mulligan.common.tokens import RUN_CREDENTIAL, bearer
from mulligan.console.services import Services
from mulligan.models import EMBEDDED
from mulligan.trainer.client import LearnerAdminClient, RunClient
from mulligan.trainer.config import TrainerSettings
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.servicer import LearnerServicer
from mulligan.trainer.learner.servicer import add_to_server as add_learners
from mulligan.trainer.learner.settings import LearnerUse
from mulligan.trainer.manager import RunManager
from mulligan.trainer.servicer import add_to_server as add_runs
from mulligan.trainer.settings import EvaluationSettings, RunSettings
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.v1 import run_service_pb2 as run_pb
from mulligan.trainer.v1 import run_service_pb2_grpc
from mulligan.trainer.wire import settings_to_proto
from tests.support.learning import PLAIN, sampled, spec
from tests.support.run_keys import write_keys
from tests.support.tiny_model import write_tiny_model
from tests.support.tokens import token_of, write_tokens
from tests.unit.trainer.test_run import World

# The calls that anybody with the role may make.
LOOKING = {"GetLearner", "ListLearners"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def trainer_settings(folder: Path, **settings: Any) -> TrainerSettings:
    chosen = {"runs_folder": "runs", "checkpoint_folder": "checkpoints", "weights_folder": "weights"}
    folders = {name: folder / place for name, place in chosen.items()}
    return TrainerSettings(
        tokens_folder=write_tokens(folder), run_keys=write_keys(folder)[0], threads=1, **(folders | settings)
    )


@asynccontextmanager
async def serving(settings: TrainerSettings, add: Callable[[grpc.aio.Server], object]) -> AsyncIterator[Endpoint]:
    """As the trainer's program serves it; the endpoint has the token of a trainer."""
    server = grpc.aio.server(interceptors=[RequestInterceptor(settings.tokens)])
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Endpoint(f"127.0.0.1:{port}", token=token_of(AccessRole.TRAINER), outage_seconds=5)
    finally:
        await server.stop(None)


async def refused(call: Awaitable[object], reason: Reason = Reason.RUN_CREDENTIAL) -> DomainError:
    with pytest.raises((DomainError, grpc.aio.AioRpcError)) as caught:
        await call
    error = from_rpc_error(caught.value) if isinstance(caught.value, grpc.aio.AioRpcError) else caught.value
    assert isinstance(error, DomainError) and error.reason is reason, error
    return error


async def test_a_stranger_neither_takes_nor_uses_nor_deletes_a_learner(tmp_path: Path, tiny: Path) -> None:
    settings = trainer_settings(tmp_path, models_folder=tiny.parent)
    servicer = LearnerServicer(settings.learner, guard=settings.guard)
    async with serving(settings, lambda server: add_learners(server, servicer)) as endpoint:
        mine = replace(endpoint, run_credential=settings.run_credential("one"))
        others: Callable[[], str] | None = settings.run_credential("two", "one")
        stranger = replace(endpoint, run_credential=others)
        for thief in (endpoint, stranger):
            await refused(LearnerClient.create(thief, "one", "one", spec(tiny)))
        learner = await LearnerClient.create(mine, "one", "one", spec(tiny))
        told = (await LearnerAdminClient(stranger).list())[0]
        assert (told.learner_id, told.owner) == ("one", "one"), "it is no secret"
        taken = LearnerClient(stranger, told.learner_id, told.owner)
        uses: dict[str, Callable[[LearnerClient], Awaitable[object]]] = {
            "Forward": lambda client: client.forward([sampled()]),
            "ForwardBackward": lambda client: client.forward_backward([sampled()], PLAIN),
            "OptimStep": lambda client: client.optim_step(),
            "SaveCheckpoint": lambda client: client.save_checkpoint("first"),
            "LoadCheckpoint": lambda client: client.load_checkpoint("first"),
            "PublishWeights": lambda client: client.publish_weights(1),
            "DeleteLearner": lambda client: client.delete(),
        }
        methods = {method.name for method in pb.DESCRIPTOR.services_by_name["LearnerService"].methods}
        assert uses.keys() | LOOKING | {"CreateLearner"} == methods, "a new call belongs to one of the sets"
        for use in uses.values():
            error = await refused(use(taken))
            assert (error.code, error.metadata) == (Code.PERMISSION_DENIED, {"learner_id": "one"})
            assert "is for the run 'two' and the scope 'one'" in error.message
        servicer._held.clock.now += 100
        await taken.compute_seconds()
        assert servicer._held.find("one").idle >= 100, "a stranger's look renews no lease"
        await learner.compute_seconds()
        assert servicer._held.find("one").idle < 100
        for use in uses.values():
            await use(learner)
        # A new learner with the id of another's would load its checkpoints.
        await refused(LearnerClient.create(stranger, "one", "two", spec(tiny)))
        for client in (learner, taken):
            await client.close()
    await servicer.close()


async def test_a_learner_is_made_of_models_below_the_models_folder_alone(tmp_path: Path, tiny: Path) -> None:
    secret = tmp_path / "secret"
    secret.symlink_to(EMBEDDED)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link").symlink_to(secret)
    models = tmp_path / "models"
    bad = [secret, models / ".." / "secret", models / "link", models, Path("/nowhere")]
    for folder, sources in ((tmp_path / "models", bad), (None, [*bad, tiny])):
        settings = trainer_settings(tmp_path, models_folder=folder)
        servicer = LearnerServicer(settings.learner, guard=settings.guard)
        async with serving(settings, partial(_add_learners, servicer)) as endpoint:
            mine = replace(endpoint, run_credential=settings.run_credential("one"))
            for source in sources:
                create = LearnerClient.create(mine, "one", "one", spec(source))
                error = await refused(create, Reason.MODEL_NOT_FOUND)
                assert error.metadata == {"field": "model.source", "source": str(source)}
                assert "models folder" in error.message or "models_folder" in error.message
        await servicer.close()


def _add_learners(servicer: LearnerServicer, server: grpc.aio.Server) -> None:
    add_learners(server, servicer)


class Used:
    """What others have in the memory and at the learner. It can be away, or refuse the trainer."""

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}
        self.learners: list[str] = []
        self.error: Exception | None = None
        self.looks: list[str] = []
        self.together: asyncio.Barrier | None = None

    async def snapshot(self, scope: str) -> int:
        self.looks.append(scope)
        if self.together is not None:
            await self.together.wait()
        if self.error is not None:
            raise self.error
        return self.versions.get(scope, 0)

    async def learner_use(self, learner_id: str) -> LearnerUse:
        return LearnerUse.IN_USE if learner_id in self.learners else LearnerUse.FREE


class Runs:
    """RunService over gRPC, with runs of fakes."""

    def __init__(self, endpoint: Endpoint, stub: run_service_pb2_grpc.RunServiceStub, keys: RunKeys, used: Used):
        self.used = used
        self.endpoint = endpoint
        self.stub = stub
        self.keys = keys

    async def start(self, run_id: str, settings: RunSettings, role: AccessRole, credential: str = "") -> str:
        """The credential that the answer has."""
        metadata = (*bearer(token_of(role)), *(((RUN_CREDENTIAL, credential),) if credential else ()))
        request = run_pb.StartRunRequest(run_id=run_id, config=settings_to_proto(settings))
        answer = await self.stub.StartRun(request, metadata=metadata)
        assert answer.run.run_id == run_id
        return str(answer.credential)

    async def ended(self, run_id: str) -> None:
        watched = self.stub.WatchRun(
            run_pb.WatchRunRequest(run_id=run_id), metadata=bearer(token_of(AccessRole.READER))
        )
        async for _ in watched:
            pass

    async def evaluation(self, run_id: str, metadata: tuple[tuple[str, str], ...]) -> None:
        """Streams one, in an environment that is not there."""
        request = run_pb.EvaluateRequest(environment="nowhere", run_id=run_id)
        async for _ in self.stub.StreamEvaluate(run_pb.StreamEvaluateRequest(request=request), metadata=metadata):
            pass


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path / "runs")


@pytest.fixture
async def runs(tmp_path: Path, world: World) -> AsyncIterator[Runs]:
    settings = trainer_settings(tmp_path)
    manager = RunManager(settings.runs_folder, world.run().services)
    keys = settings.keys
    assert keys is not None
    used = Used()
    admission = settings.admission(used.snapshot, used.learner_use)
    async with serving(settings, lambda server: add_runs(server, manager, admission)) as endpoint:
        async with grpc.aio.insecure_channel(endpoint.address) as channel:
            yield Runs(endpoint, run_service_pb2_grpc.RunServiceStub(channel), keys, used)
        await manager.close()


def scoped(settings: RunSettings, scope: str) -> RunSettings:
    return settings.model_copy(
        update={"algorithm": settings.algorithm.model_copy(update={"memory_scope": scope}), "steps": 1}
    )


async def test_who_starts_a_run_gets_its_credential_and_nobody_else(runs: Runs, world: World) -> None:
    settings = scoped(world.folder.settings(), "")
    mine = await runs.start("mine", settings, AccessRole.TRAINER)
    assert runs.keys.verify(mine) == RunGrant("mine", ("mine",))
    assert await runs.start("mine", settings, AccessRole.TRAINER) == "", "others may find the run, too"
    other = runs.keys.sign(RunGrant("other", ("mine",)), 60)
    assert await runs.start("mine", settings, AccessRole.TRAINER, other) == ""
    for again in (
        await runs.start("mine", settings, AccessRole.TRAINER, mine),
        await runs.start("mine", settings, AccessRole.ADMIN),
    ):
        assert runs.keys.verify(again) == RunGrant("mine", ("mine",))
    await refused(runs.start("second", settings, AccessRole.ACTOR), Reason.INSUFFICIENT_ROLE)


async def test_a_run_writes_to_its_own_scope_or_a_shared_one_or_one_that_its_caller_may_write_to(
    runs: Runs, world: World
) -> None:
    settings = world.folder.settings()
    error = await refused(runs.start("thief", scoped(settings, "run"), AccessRole.READER), Reason.INSUFFICIENT_ROLE)
    error = await refused(runs.start("thief", scoped(settings, "somebodys-run"), AccessRole.TRAINER))
    assert error.metadata == {"scope": "somebodys-run"}
    team = runs.keys.sign(RunGrant("", ("team",)), 60)
    given = await runs.start("ours", scoped(settings, "team"), AccessRole.TRAINER, team)
    assert runs.keys.verify(given) == RunGrant("ours", ("team",))


async def test_a_new_run_gets_no_credential_for_what_others_have(runs: Runs, world: World) -> None:
    """Such as a loop of somebody's own, with a credential of `mulligan token`, or a run of another trainer."""
    settings = scoped(world.folder.settings(), "")
    runs.used.versions = {"my-loop": 3}
    runs.used.learners = ["my-learner"]
    trainer = AccessRole.TRAINER
    for run_id, metadata in (
        ("my-loop", {"scope": "my-loop"}),
        ("my-learner", {"learner_id": "my-learner"}),
    ):
        for wrong in ("", runs.keys.sign(RunGrant("other", ("other",)), 60)):
            error = await refused(runs.start(run_id, settings, trainer, wrong))
            assert error.metadata == metadata and "so a new run needs another run_id" in error.message
        listed = (await runs.stub.ListRuns(run_pb.ListRunsRequest(), metadata=caller(""))).runs
        assert run_id not in {one.run_id for one in listed}, "nothing was made"
        owner = runs.keys.sign(RunGrant(run_id, (run_id,)), 60)
        given = await runs.start(run_id, settings, trainer, owner)
        assert runs.keys.verify(given) == RunGrant(run_id, (run_id,))
        await runs.ended(run_id)
    runs.used.learners.append("another")
    shared = await refused(runs.start("another", scoped(settings, "global"), trainer))
    assert shared.metadata == {"learner_id": "another"}
    await runs.start("free", settings, trainer)
    assert "free" in runs.used.looks
    await runs.ended("free")
    runs.used.versions["admins-may"] = 1
    await runs.start("admins-may", settings, AccessRole.ADMIN)
    assert "admins-may" not in runs.used.looks


async def test_a_run_is_refused_while_nobody_can_say_whether_its_id_is_free(runs: Runs, world: World) -> None:
    settings = scoped(world.folder.settings(), "")
    for error in (
        ServiceUnavailable("memory:50053", 5, "away"),
        DomainError(Reason.BAD_CREDENTIAL, "the trainer's token is unknown"),
    ):
        runs.used.error = error
        told = await refused(runs.start("new", settings, AccessRole.TRAINER), Reason.SERVICE_UNAVAILABLE)
        assert told.metadata == {"endpoint": "memory"} and str(error) in told.message
    before = len(runs.used.looks)
    await refused(runs.start("../runs", settings, AccessRole.TRAINER), Reason.INVALID_FIELD)
    assert len(runs.used.looks) == before, "nothing is looked up by what is no id"


async def test_of_two_who_start_one_run_at_once_one_gets_its_credential(runs: Runs, world: World) -> None:
    settings = scoped(world.folder.settings(), "")
    runs.used.together = asyncio.Barrier(2)  # both found no run when they looked
    given = await asyncio.gather(*(runs.start("one", settings, AccessRole.TRAINER) for _ in range(2)))
    assert sorted(map(bool, given)) == [False, True]


async def test_a_run_of_a_model_outside_is_refused_at_once(runs: Runs, world: World) -> None:
    settings = world.folder.settings()
    outside = settings.model_copy(update={"model": settings.model.model_copy(update={"source": "/etc"})})
    error = await refused(runs.start("outside", outside, AccessRole.TRAINER), Reason.INVALID_SETTING)
    assert error.metadata["field"] == "model.source" and "models_folder" in error.message


async def test_a_stranger_neither_stops_nor_resumes_nor_evaluates_a_run(runs: Runs, world: World) -> None:
    """Looking needs no credential."""
    settings = scoped(world.folder.settings(), "")
    mine = await runs.start("mine", settings, AccessRole.TRAINER)
    for wrong in ("", runs.keys.sign(RunGrant("other", ("mine",)), 60)):
        for call in (
            runs.stub.StopRun(run_pb.StopRunRequest(run_id="mine"), metadata=caller(wrong)),
            runs.stub.ResumeRun(run_pb.ResumeRunRequest(run_id="mine"), metadata=caller(wrong)),
            runs.stub.Evaluate(run_pb.EvaluateRequest(environment="a", run_id="mine"), metadata=caller(wrong)),
            runs.evaluation("mine", caller(wrong)),
        ):
            error = await refused(call)
            assert (error.code, error.metadata) == (Code.PERMISSION_DENIED, {"run_id": "mine"})
            assert "the run 'mine' needs its credential" in error.message
    others = caller("")
    assert (await runs.stub.GetRun(run_pb.GetRunRequest(run_id="mine"), metadata=others)).run.run_id == "mine"
    listed = (await runs.stub.ListRuns(run_pb.ListRunsRequest(), metadata=others)).runs
    assert "mine" in {one.run_id for one in listed}
    watched = runs.stub.WatchRun(run_pb.WatchRunRequest(run_id="mine"), metadata=others)
    states = [one.event.state_changed.state async for one in watched if one.event.HasField("state_changed")]
    assert states[-1] == run_pb.RUN_STATE_COMPLETED, "nobody could stop it"
    await refused(
        runs.stub.ResumeRun(run_pb.ResumeRunRequest(run_id="mine"), metadata=caller(mine)), Reason.RUN_COMPLETED
    )
    for allowed in (caller(mine), bearer(token_of(AccessRole.ADMIN))):
        stopped = await runs.stub.StopRun(run_pb.StopRunRequest(run_id="mine"), metadata=allowed)
        assert stopped.run.state == run_pb.RUN_STATE_COMPLETED
        await refused(runs.evaluation("mine", allowed), Reason.UNKNOWN_ENVIRONMENT)


async def test_each_call_of_runs_either_looks_or_asks_for_the_credential(runs: Runs, world: World) -> None:
    """A new call with a run's id belongs to one of the two."""
    looks = {"GetRun", "ListRuns", "WatchRun", "ListExperiences"}
    acts = {"StopRun", "ResumeRun", "Evaluate", "StreamEvaluate"}  # those of the test before
    methods = {method.name for method in run_pb.DESCRIPTOR.services_by_name["RunService"].methods}
    assert looks | acts | {"StartRun"} == methods


async def test_a_client_keeps_the_credentials_of_the_runs_that_it_started(runs: Runs, world: World) -> None:
    settings = scoped(world.folder.settings(), "")
    client, stranger = RunClient(runs.endpoint), RunClient(runs.endpoint)
    await client.start("mine", settings)
    await refused(stranger.stop("mine"))
    await refused(stranger.evaluate("nowhere", EvaluationSettings(), run_id="mine"))
    await client.stop("mine")
    await refused(client.evaluate("nowhere", EvaluationSettings(), run_id="mine"), Reason.UNKNOWN_ENVIRONMENT)
    for one in (client, stranger):
        await one.close()


async def test_commands_and_the_console_find_the_credential_of_a_run_that_their_user_started(
    runs: Runs, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv(connection.TOKEN, token_of(AccessRole.TRAINER))
    address = runs.endpoint.address
    settings = scoped(world.folder.settings(), "")
    await train._train("mine", settings, watch=False, trainer=address)
    client = RunClient(runs.endpoint)
    kept = run_credentials.kept_credential(address, "mine")
    assert runs.keys.verify(kept) == RunGrant("mine", ("mine",))
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "state").rglob("*") if path.name != "mulligan"} == {0}
    await train._train("mine", settings, watch=False, trainer=address)  # gets it again
    async for _ in client.watch("mine"):
        pass
    await refused(client.resume("mine"))
    await refused(stop._resume("mine", False, False, address), Reason.RUN_COMPLETED)
    console = Services({"trainer": runs.endpoint}, partial(run_credentials.kept_credential, address))
    assert "is complete" in (await console.resume("mine")).error
    assert "needs its credential" in (await Services({"trainer": runs.endpoint}).resume("mine")).error
    # That of another trainer's run with the same id is not sent.
    assert run_credentials.kept_credential("127.0.0.1:1", "mine") == ""
    # The variable has the last word, and a file that others may read is refused.
    monkeypatch.setenv(connection.RUN_CREDENTIAL, runs.keys.sign(RunGrant("other"), 60))
    error = await refused(stop._resume("mine", False, False, address))
    assert "`mulligan token` prints another" in connection.said(error)
    monkeypatch.delenv(connection.RUN_CREDENTIAL)
    next(path for path in (tmp_path / "state").rglob("mine")).chmod(0o644)
    with pytest.raises(SystemExit):
        await stop._resume("mine", False, False, address)
    assert "other users may use it" in (await console.stop("mine")).error
    await client.close()


def caller(credential: str) -> tuple[tuple[str, str], ...]:
    """The metadata of somebody with the role trainer."""
    return (*bearer(token_of(AccessRole.TRAINER)), *(((RUN_CREDENTIAL, credential),) if credential else ()))
