"""A learner that nobody calls for as long as its lease is deleted; one in use never is. Time is the server's clock,
which the tests set forward."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from typer.testing import CliRunner

from mulligan.cli.learners import learners as command
from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.server import RequestInterceptor
from mulligan.trainer.client import LearnerAdminClient
from mulligan.trainer.learner import client as client_module
from mulligan.trainer.learner import servicer as servicer_module
from mulligan.trainer.learner.client import LEASE_SECONDS, LearnerClient
from mulligan.trainer.learner.held import UNANSWERED_SECONDS
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.servicer import LearnerServicer
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.v1 import learner_service_pb2_grpc as pb_grpc
from tests.contract.trainer.learner.test_service import forward_backward, refusal
from tests.support.learning import server_settings, spec
from tests.support.tiny_model import write_tiny_model

LEASE = 3600.0  # far longer than a test takes
IDS: dict[str, Any] = {"learner_id": "learner", "owner": "run"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


class Served:
    """A server of one learner, in this process."""

    def __init__(self, servicer: LearnerServicer, stub: pb_grpc.LearnerServiceStub, address: str, model: Path):
        self.servicer = servicer
        self.stub = stub
        self.address = address
        self.model = model
        self.endpoint = Endpoint(address, outage_seconds=5)

    def pass_by(self, seconds: float) -> None:
        self.servicer._held.clock.now += seconds

    async def create(self, lease: float | None = LEASE, **ids: Any) -> pb.CreateLearnerResponse:
        request = pb.CreateLearnerRequest(model=pb.ModelConfig(source=str(self.model)), **(IDS | ids))
        if lease is not None:
            request.lease.CopyFrom(Duration(seconds=int(lease), nanos=int(lease % 1 * 1e9)))
        answer: pb.CreateLearnerResponse = await self.stub.CreateLearner(request)
        return answer

    async def held(self) -> list[pb.LearnerInfo]:
        return list((await self.stub.ListLearners(pb.ListLearnersRequest())).learners)

    async def until(self, condition: Callable[[list[pb.LearnerInfo]], object]) -> None:
        async with asyncio.timeout(60):
            while not condition(await self.held()):  # noqa: ASYNC110 - as any caller would
                await asyncio.sleep(0.02)

    async def one_more_look_at_leases(self) -> None:
        ticks = self.servicer._held.clock.now
        async with asyncio.timeout(60):
            while self.servicer._held.clock.now == ticks:  # noqa: ASYNC110 - the server's own task sets it
                await asyncio.sleep(0.02)


@pytest.fixture
async def served(tmp_path: Path, tiny: Path) -> AsyncIterator[Served]:
    servicer = LearnerServicer(server_settings(tmp_path))
    async with serving(servicer, tiny) as served:
        yield served


@asynccontextmanager
async def serving(servicer: LearnerServicer, tiny: Path) -> AsyncIterator[Served]:
    server = grpc.aio.server(interceptors=[RequestInterceptor()])
    pb_grpc.add_LearnerServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Served(servicer, pb_grpc.LearnerServiceStub(channel), address, tiny)
    await server.stop(None)
    await servicer.close()


async def test_a_forgotten_learner_is_deleted_and_its_place_is_free(served: Served) -> None:
    await served.create()
    served.pass_by(LEASE + 1)
    await served.until(lambda held: not held)
    assert (await refusal(served.stub.ForwardBackward(forward_backward(1)))).reason is Reason.UNKNOWN_LEARNER
    await served.create(learner_id="another")


async def test_a_place_is_free_at_the_very_moment(served: Served) -> None:
    """Not only when the server has looked."""
    await served.create()
    served.pass_by(LEASE + 1)
    await served.create(learner_id="another")
    assert [info.learner_id for info in await served.held()] == ["another"]


async def test_any_call_of_its_owner_renews(served: Served) -> None:
    await served.create()
    stub = served.stub
    calls: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: stub.ForwardBackward(forward_backward(1)),
        lambda: stub.OptimStep(pb.OptimStepRequest(sequence=2, **IDS)),
        lambda: stub.Forward(pb.ForwardRequest(**IDS)),
        lambda: stub.GetLearner(pb.GetLearnerRequest(learner_id="learner")),
        lambda: stub.SaveCheckpoint(pb.SaveCheckpointRequest(name="one", **IDS)),
        lambda: stub.LoadCheckpoint(pb.LoadCheckpointRequest(name="one", **IDS)),
        lambda: stub.PublishWeights(pb.PublishWeightsRequest(policy_version=1, **IDS)),
        lambda: refusal(stub.OptimStep(pb.OptimStepRequest(sequence=99, **IDS))),
        served.create,
    )
    for sequence, call in enumerate(calls):
        served.pass_by(LEASE * 0.9)
        await call()
        [info] = await served.held()
        assert info.idle.seconds < LEASE / 10, sequence
        assert info.lease_left.seconds > LEASE * 0.9, sequence


async def test_to_look_and_to_be_refused_renews_nothing(served: Served) -> None:
    await served.create()
    served.pass_by(LEASE * 0.9)
    error = await refusal(served.stub.OptimStep(pb.OptimStepRequest(learner_id="learner", owner="other", sequence=1)))
    assert error.reason is Reason.LEARNER_OWNED
    [info] = await served.held()
    assert info.idle.seconds >= int(LEASE * 0.9) and info.lease_left.seconds <= LEASE / 10


async def test_without_a_lease_that_of_the_server_counts(served: Served) -> None:
    await served.create(lease=None)
    [info] = await served.held()
    assert LEASE * 0.9 < info.lease_left.seconds <= LEASE
    served.pass_by(LEASE * 0.9)
    await served.stub.GetLearner(pb.GetLearnerRequest(learner_id="learner"))
    served.pass_by(LEASE * 0.9)
    await served.one_more_look_at_leases()
    assert len(await served.held()) == 1
    served.pass_by(LEASE + 1)
    await served.until(lambda held: not held)


@pytest.mark.parametrize("returns", [False, True])
async def test_a_caller_that_vanishes_while_its_learner_is_made(
    served: Served, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    """The place is free soon, unless the caller comes back: then the learner is not made again."""
    begun = threading.Event()
    go_on = threading.Event()
    made: list[str] = []

    def slow(learner_id: str, *arguments: Any) -> Learner:
        made.append(learner_id)
        begun.set()
        assert go_on.wait(60)
        return Learner(learner_id, *arguments)

    monkeypatch.setattr(servicer_module, "Learner", slow)
    async with grpc.aio.insecure_channel(served.address) as channel:
        request = pb.CreateLearnerRequest(model=pb.ModelConfig(source=str(served.model)), **IDS)
        request.lease.CopyFrom(Duration(seconds=int(LEASE)))
        call = pb_grpc.LearnerServiceStub(channel).CreateLearner(request)
        assert await asyncio.to_thread(begun.wait, 60)
        call.cancel()
    go_on.set()
    await served.until(lambda held: len(held) == 1)
    [info] = await served.held()
    assert info.lease_left.seconds <= UNANSWERED_SECONDS
    if returns:
        await served.create()
        served.pass_by(LEASE * 0.9)
        await served.one_more_look_at_leases()
        assert len(await served.held()) == 1 and made == ["learner"]
    else:
        served.pass_by(UNANSWERED_SECONDS + 1)
        await served.create(learner_id="another")
        assert made == ["learner", "another"]


async def test_a_client_that_is_cancelled_while_its_learner_is_made_leaves_none(served: Served, tiny: Path) -> None:
    for number in range(8):
        task = asyncio.create_task(LearnerClient.create(served.endpoint, "learner", "run", spec(tiny)))
        await asyncio.sleep(0.004 * number)
        if task.cancel():
            await asyncio.wait([task])
        if not task.cancelled():
            await task.result().close()
        assert await served.held() == []


async def test_of_many_that_come_at_once_one_gets_the_place(served: Served) -> None:
    answers = await asyncio.gather(
        *(served.create(learner_id=f"learner-{place}") for place in range(5)), return_exceptions=True
    )
    refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert [error.code() for error in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 4
    assert len(await served.held()) == 1


async def test_a_server_may_keep_learners_for_ever(tmp_path: Path, tiny: Path) -> None:
    servicer = LearnerServicer(replace(server_settings(tmp_path), lease_seconds=None))
    async with serving(servicer, tiny) as served:
        await served.create(lease=None)
        served.pass_by(1e9)
        await served.one_more_look_at_leases()
        [info] = await served.held()
        assert not info.HasField("lease_left") and info.idle.seconds >= 10**9
        await served.create(lease=LEASE)  # the last call decides
        served.pass_by(LEASE + 1)
        await served.until(lambda held: not held)


async def test_work_that_takes_longer_than_the_lease(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its caller gave up on it, and though another call waits meanwhile."""
    await served.create()
    begun = threading.Event()
    go_on = threading.Event()

    def slow(learner: Learner, *arguments: Any) -> dict[str, float]:
        begun.set()
        assert go_on.wait(60)
        return {}

    monkeypatch.setattr(Learner, "forward_backward", slow)
    given_up = served.stub.ForwardBackward(forward_backward(1))
    assert await asyncio.to_thread(begun.wait, 60)
    given_up.cancel()
    served.pass_by(LEASE * 5)
    waits = asyncio.ensure_future(served.stub.OptimStep(pb.OptimStepRequest(sequence=2, **IDS)))
    await served.one_more_look_at_leases()
    served.pass_by(LEASE * 5)
    await served.one_more_look_at_leases()
    assert len(await served.held()) == 1
    go_on.set()
    assert (await waits).metrics["skipped"] == 1
    [info] = await served.held()
    assert info.idle.seconds < LEASE / 10


async def test_a_refusal_names_the_holder_and_what_frees_the_place(served: Served) -> None:
    served.servicer._settings = replace(served.servicer._settings, lease_seconds=None)
    await served.create(lease=None)
    served.pass_by(720)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.create(learner_id="another")
    told = caught.value.details()
    assert told is not None and told.startswith(
        "this server holds 1 of at most 1 learners: 'learner' of 'run', idle for"
    )
    assert told.endswith("with no lease. To free one: mulligan learners delete learner")


async def test_our_own_client_keeps_its_learner(served: Served, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it calls nothing: a run samples for hours."""
    monkeypatch.setattr(client_module, "RENEWALS", 10_000)
    client = await LearnerClient.create(served.endpoint, "learner", "run", spec(tiny))
    for _ in range(3):
        served.pass_by(LEASE_SECONDS * 0.9)
        await served.until(lambda held: held[0].lease_left.seconds > LEASE_SECONDS * 0.9)
    await client.close()
    assert await served.held() == []


@pytest.mark.parametrize("seconds", [0, -1, 31 * 24 * 3600])
async def test_a_lease_that_is_none(served: Served, seconds: int) -> None:
    request = pb.CreateLearnerRequest(lease=Duration(seconds=seconds), **IDS)
    error = await refusal(served.stub.CreateLearner(request))
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_FIELD, "lease")


async def test_it_is_listed_and_deleted_from_the_command_line(served: Served) -> None:
    await served.create(lease=None, owner="[bold]somebody")
    served.pass_by(720)

    async def called(*arguments: str) -> Any:
        at = [*arguments, "--trainer", served.address]
        return await asyncio.to_thread(CliRunner().invoke, command, at, env={"COLUMNS": "200"})

    listed = await called()
    assert listed.exit_code == 0, listed.output
    for shown in ("learner", "[bold]somebody", "12 min", "48 min"):
        assert shown in listed.output, listed.output
    unknown = await called("delete", "no-such")
    assert unknown.exit_code == 1
    assert (await called("delete", "learner")).output.endswith("deleted\n")
    assert await served.held() == []
    client = LearnerAdminClient(served.endpoint)
    await client.delete("learner", "anybody")  # an unknown one succeeds
    await served.create()
    with pytest.raises(DomainError) as caught:
        await client.delete("learner", "anybody")
    assert caught.value.reason is Reason.LEARNER_OWNED
    await client.close()
