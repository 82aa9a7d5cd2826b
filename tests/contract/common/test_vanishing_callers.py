"""Callers that vanish at each moment of a call leave nothing behind, and whoever repeats the call gets its answer."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from mulligan.env import servicer as env
from mulligan.env.episodes import EpisodeLimits, EpisodeTable
from mulligan.env.v1 import env_service_pb2 as env_pb
from mulligan.env.v1 import env_service_pb2_grpc as env_grpc
from mulligan.env.workers import WorkerPool
from mulligan.memory import servicer as memory
from mulligan.memory.stores.sqlite import Settings as StoreSettings
from mulligan.memory.stores.sqlite import open as open_store
from mulligan.memory.v1 import memory_service_pb2 as memory_pb
from mulligan.memory.v1 import memory_service_pb2_grpc as memory_grpc
from mulligan.policy import servicer as policy
from mulligan.policy.v1 import policy_admin_service_pb2 as admin_pb
from mulligan.policy.v1 import policy_admin_service_pb2_grpc as admin_grpc
from mulligan.policy.v1 import policy_service_pb2 as policy_pb
from mulligan.policy.v1 import policy_service_pb2_grpc as policy_grpc
from tests.support.scripted import Running, started
from tests.support.vanishing import at_each_wait, vanishing
from tests.support.waiting import until
from tests.unit.env.test_episode_memory import Echo


async def test_episodes() -> None:
    echo = Echo(0.005)  # longer than the loop waits for quick calls
    workers = WorkerPool(size=2, limit_seconds=60.0, max_abandoned=2)
    table = EpisodeTable({"echo": echo}, workers, EpisodeLimits(max_episodes=10))
    name = ""

    async def begun(answer: Any) -> None:
        nonlocal name
        if answer is None:
            again = await stub.StartEpisode(start())
            assert again.observation == "begin"
        assert table.live_count == 1, "one, whoever asked for it"
        await stub.EndEpisode(env_pb.EndEpisodeRequest(episode_id=name))
        assert table.live_count == table.answer_bytes == 0
        await until(lambda: not echo.open)
        name = uuid4().hex

    def start() -> env_pb.StartEpisodeRequest:
        return env_pb.StartEpisodeRequest(episode_id=name, environment="echo", task_id="t")

    played = 0

    def step() -> env_pb.StepEpisodeRequest:
        return env_pb.StepEpisodeRequest(episode_id=name, step_index=played, action=f"a{played}")

    async def stepped(answer: Any) -> None:
        nonlocal played
        again = await stub.StepEpisode(step())
        assert again.observation == f"a{played}" and (answer is None or answer == again)
        played += 1

    async with vanishing(lambda server: env.add_to_server(server, table)) as (caller, channel):
        stub = env_grpc.EnvServiceStub(channel)
        name = uuid4().hex
        assert await at_each_wait(caller, lambda: stub.StartEpisode(start()), begun) > 0
        await stub.StartEpisode(start())
        assert await at_each_wait(caller, lambda: stub.StepEpisode(step()), stepped) > 0
        assert echo.played == played, "each step once"
    workers.close()


async def test_reflections(tmp_path: Path) -> None:
    store = await open_store(str(tmp_path / "memory.db"), StoreSettings())
    written = 0

    def add() -> memory_pb.AddReflectionRequest:
        provenance = memory_pb.Provenance(environment="lake")
        return memory_pb.AddReflectionRequest(
            request_id=f"r{written}", scope="s", text=f"text {written}", provenance=provenance
        )

    async def added(answer: Any) -> None:
        nonlocal written
        again = await stub.AddReflection(add())
        assert answer is None or answer == again
        written += 1
        listed = await stub.ListReflections(memory_pb.ListReflectionsRequest(scope="s"))
        assert sorted(found.text for found in listed.reflections) == sorted(f"text {n}" for n in range(written))

    async with vanishing(lambda server: memory.add_to_server(server, store)) as (caller, channel):
        stub = memory_grpc.MemoryServiceStub(channel)
        assert await at_each_wait(caller, lambda: stub.AddReflection(add()), added) > 0
    await store.close()


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with started(state_folder=tmp_path / "state", max_models=3, session_idle_seconds=0.01) as found:
        yield found


async def test_completions(running: Running) -> None:
    policies = running.served.policies
    asked = policy_pb.GenerateRequest(n=2, session_id="s", sampling=policy_pb.SamplingParams(temperature=1.0))
    asked.token_ids.ids.extend([1, 2, 3])

    async def nothing_runs(answer: Any) -> None:
        deployment = running.served.deployment
        await until(lambda: len(running.served.backend.ended) == len(running.served.backend.asks))
        assert (deployment.calls, deployment.in_flight) == (0, 0)

    async with vanishing(lambda server: policy.add_to_server(server, policies)) as (caller, channel):
        stub = policy_grpc.PolicyServiceStub(channel)
        assert await at_each_wait(caller, lambda: stub.Generate(asked), nothing_runs) > 0


async def test_models(running: Running) -> None:
    policies = running.served.policies
    name = ""

    async def loaded(answer: Any) -> None:
        nonlocal name
        await until(lambda: not policies._tasks)  # a change goes on without its caller
        if answer is None and len(list(policies.deployments)) == 1:  # whose request nobody had read
            return
        await running.serves("two", 0, name)
        assert len(list(policies.deployments)) == 2
        await running.client.unload_model(name)
        name = f"p-{uuid4().hex}"

    async with vanishing(lambda server: policy.add_to_server(server, policies)) as (caller, channel):
        stub = admin_grpc.PolicyAdminServiceStub(channel)
        name = "p"
        call = lambda: stub.LoadModel(admin_pb.LoadModelRequest(policy=name, model="two"))  # noqa: E731
        assert await at_each_wait(caller, call, loaded) > 0


async def test_uploads(running: Running, tmp_path: Path) -> None:
    policies = running.served.policies
    content = (2).to_bytes(8, "little") + b"{}" + bytes(100)
    header = admin_pb.UploadWeightsRequest.Header(
        kind=admin_pb.WEIGHTS_KIND_FULL, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    pieces = [admin_pb.UploadWeightsRequest(chunk=content[begin : begin + 40]) for begin in range(0, 110, 40)]

    async def nothing_left(answer: Any) -> None:
        if answer is not None:
            await policies.uploads.remove(answer.uri)
        folder = tmp_path / "state" / "uploads"
        await until(lambda: policies.uploads.reserved_bytes == 0 and list(folder.iterdir()) == [])

    async with vanishing(lambda server: policy.add_to_server(server, policies)) as (caller, channel):
        stub = admin_grpc.PolicyAdminServiceStub(channel)
        messages = [admin_pb.UploadWeightsRequest(header=header), *pieces]
        assert await at_each_wait(caller, lambda: stub.UploadWeights(iter(messages)), nothing_left) > 5
