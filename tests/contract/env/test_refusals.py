"""What the environment service answers on the wire when it refuses: codes, reasons, and a hint when to come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any
from uuid import uuid4

import grpc
import pytest

from mulligan.common.errors import DomainError
from mulligan.common.status import from_rpc_error
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from mulligan.testing.processes import ServiceProcesses

LEASE_SECONDS = 0.5
ENVIRONMENTS = {
    "chained": {"kind": "mulligan.testing.chained", "max_steps": 2},
    "rigid": {"kind": "mulligan.testing.chained", "can_fork": False},
}


@pytest.fixture(scope="module")
def address(shared_services: ServiceProcesses) -> str:
    return shared_services.start("env", environments=ENVIRONMENTS).address


@pytest.fixture
async def stub(address: str) -> AsyncIterator[pb_grpc.EnvServiceStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield pb_grpc.EnvServiceStub(channel)


def starting(episode_id: str, environment: str = "chained") -> pb.StartEpisodeRequest:
    return pb.StartEpisodeRequest(episode_id=episode_id, environment=environment, task_id="plain")


def stepping(episode_id: str, index: int, action: str = "a") -> pb.StepEpisodeRequest:
    return pb.StepEpisodeRequest(episode_id=episode_id, step_index=index, action=action)


async def refusal(call: Awaitable[Any]) -> tuple[str, str, DomainError]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert error is not None, caught.value
    return caught.value.code().name, str(error.reason), error


async def test_each_refusal_of_a_step_or_a_fork_has_its_code(stub: pb_grpc.EnvServiceStub) -> None:
    one = uuid4().hex
    other = uuid4().hex
    rigid = uuid4().hex
    for episode_id, environment in ((one, "chained"), (other, "chained"), (rigid, "rigid")):
        await stub.StartEpisode(starting(episode_id, environment))
    first = await stub.StepEpisode(stepping(one, 0))
    assert await stub.StepEpisode(stepping(one, 0)) == first
    skipped = await refusal(stub.StepEpisode(stepping(one, 2)))
    assert skipped[:2] == ("FAILED_PRECONDITION", "STEP_SKIPPED") and skipped[2].metadata == {"next_step_index": "1"}
    conflict = await refusal(stub.StepEpisode(stepping(one, 0, "b")))
    assert conflict[:2] == ("FAILED_PRECONDITION", "STEP_CONFLICT")
    await stub.StepEpisode(stepping(one, 1))
    assert (await refusal(stub.StepEpisode(stepping(one, 2))))[:2] == ("FAILED_PRECONDITION", "EPISODE_FINISHED")
    assert (await refusal(stub.StepEpisode(stepping("nobody", 0))))[:2] == ("NOT_FOUND", "UNKNOWN_EPISODE")

    def forking(source: str, index: int, new: str) -> Awaitable[Any]:
        return stub.ForkEpisode(pb.ForkEpisodeRequest(episode_id=source, step_index=index, new_episode_id=new))

    copied = await forking(other, 0, "copy")
    assert await forking(other, 0, "copy") == copied and copied.lease.seconds == 600
    for call, code, reason in (
        (forking(one, 2, "new"), "FAILED_PRECONDITION", "EPISODE_FINISHED"),
        (forking(other, 1, "new"), "FAILED_PRECONDITION", "STEP_SKIPPED"),
        (forking(other, 0, rigid), "ALREADY_EXISTS", "EPISODE_CONFLICT"),
        (forking("nobody", 0, "new"), "NOT_FOUND", "UNKNOWN_EPISODE"),
        (forking(rigid, 0, "new"), "UNIMPLEMENTED", "FORK_UNSUPPORTED"),
        (forking(other, -1, "new"), "INVALID_ARGUMENT", "INVALID_FIELD"),
        (forking(other, 0, ""), "INVALID_ARGUMENT", "INVALID_FIELD"),
    ):
        assert (await refusal(call))[:2] == (code, reason)


async def test_a_full_server_says_when_to_come_back(services: ServiceProcesses) -> None:
    server = services.start("env", environments=ENVIRONMENTS, max_episodes=1)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.EnvServiceStub(channel)
        await stub.StartEpisode(starting("a"))
        fork = pb.ForkEpisodeRequest(episode_id="a", new_episode_id="b")
        for call in (stub.StartEpisode(starting("b")), stub.ForkEpisode(fork)):
            code, reason, error = await refusal(call)
            assert (code, reason) == ("RESOURCE_EXHAUSTED", "CAPACITY_REACHED")
            assert error.retry_after is not None and 0 < error.retry_after.total_seconds() < 10
        await stub.EndEpisode(pb.EndEpisodeRequest(episode_id="a"))
        await stub.StartEpisode(starting("b"))


async def test_an_idle_episode_says_that_it_expired(services: ServiceProcesses) -> None:
    server = services.start("env", environments=ENVIRONMENTS, lease_seconds=LEASE_SECONDS)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.EnvServiceStub(channel)
        started = await stub.StartEpisode(starting("a"))
        assert started.lease.ToMilliseconds() == LEASE_SECONDS * 1000
        await asyncio.sleep(LEASE_SECONDS * 1.2)
        assert (await refusal(stub.StepEpisode(stepping("a", 0))))[:2] == ("NOT_FOUND", "EPISODE_EXPIRED")
        (item,) = (await stub.StepEpisodes(pb.StepEpisodesRequest(steps=[stepping("a", 0)]))).items
        assert (item.error.code, item.error.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "EPISODE_EXPIRED")
        fork = pb.ForkEpisodeRequest(episode_id="a", new_episode_id="late")
        assert (await refusal(stub.ForkEpisode(fork)))[:2] == ("NOT_FOUND", "EPISODE_EXPIRED")
