"""Over gRPC, against real processes: env servers that come back as others, and a run's disk and folder."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import Split
from mulligan.env.replicas import EnvReplicas, connect
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcess, ServiceProcesses, flags
from mulligan.trainer.client import RunClient
from mulligan.trainer.events import StateEvent, StepEvent
from mulligan.trainer.folder import RunState
from mulligan.trainer.settings import EvaluationSettings

SECONDS = 100.0


def offering(seed: int) -> dict[str, Any]:
    lake = {"kind": "frozenlake", "size_min": 3, "size_max": 3, "prompts": "compact", "seed": seed}
    return {"environments": {"frozenlake-3x3": lake, "untested": lake | {"seed": 0, "test_tasks": 0}}}


def come_back(server: ServiceProcess, seed: int) -> None:
    server.kill()
    server.arguments = flags(offering(seed))
    server.start()


@pytest.fixture(scope="module")
def loop(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return Loop.start(shared_services, tmp_path_factory.mktemp("loop"), env=offering(0))


@pytest.fixture
async def client(loop: Loop) -> AsyncIterator[RunClient]:
    client = loop.client()
    yield client
    await client.close()


async def stepped(client: RunClient, run_id: str) -> None:
    async for entry in client.watch(run_id):
        if isinstance(entry.event, StepEvent):
            return


@pytest.mark.parametrize(
    ("field", "near", "changes"),
    [
        ("environment", "frozenlake-3x3", {"environment": "frozenlake-33"}),
        (
            "sampler.shares",
            "untested",
            {"sampler": {"name": "mixture", "shares": {"frozenlake-3x3": 0.5, "untestd": 0.5}}},
        ),
        ("policies.actor", "actor", {"policies": {"actor": "acter"}}),
        ("policies.reflector", "actor", {"policies": {"reflector": "acter"}}),
        ("tracking.writers[0]", "tensorboard", {"tracking": {"writers": ["tensorbord"]}}),
    ],
)
async def test_an_unknown_name_is_told_with_its_setting_and_the_nearest_one(
    loop: Loop, client: RunClient, field: str, near: str, changes: dict[str, Any]
) -> None:
    run_id = field.partition("[")[0].replace(".", "-")
    try:
        await client.start(run_id, small_run(**changes))
    except DomainError as refused:  # what needs no other service
        said = refused.message
    else:
        said = await loop.failure(run_id)
    assert f"{field}: " in said and f"; did you mean '{near}'?" in said


async def test_an_env_server_that_comes_back_with_another_seed(loop: Loop, client: RunClient) -> None:
    await client.start("run", small_run(steps=500, checkpoint_every=1))
    await stepped(client, "run")
    await asyncio.to_thread(come_back, loop.env, 1)
    error = await loop.failure("run")
    assert "task 'train" in error and "--accept-environment" in error
    for chain in loop.experiences("run"):
        second = chain.sample("second")
        if second is not None and second.turns and chain["first"].turns:
            assert second.turns[0].observation == chain["first"].turns[0].observation

    with pytest.raises(DomainError) as caught:
        await client.resume("run")
    assert caught.value.reason is Reason.ENVIRONMENT_CHANGED and caught.value.code == "FAILED_PRECONDITION"
    assert "showed" in caught.value.message and (await client.get("run")).state is RunState.FAILED

    step = (await client.get("run")).step
    assert (await client.resume("run", accept_environment=True)).state is RunState.RUNNING
    async for entry in client.watch("run"):
        if isinstance(entry.event, StepEvent) and entry.event.step > step:
            await client.stop("run")
    assert (await client.get("run")).state is RunState.STOPPED
    assert any("in another environment, which was accepted" in text for text in await loop.notices("run"))

    assert (await client.resume("run")).state is RunState.RUNNING, "it is the run's own now"
    await client.stop("run")
    async for _ in client.watch("run"):
        pass
    await asyncio.to_thread(come_back, loop.env, 0)


async def test_an_environment_without_test_tasks_is_refused_before_anything_is_paid_for(
    loop: Loop, client: RunClient
) -> None:
    published = list((loop.folder / "weights").iterdir())
    await client.start("untested", small_run(environment="untested"))
    error = await loop.failure("untested")
    assert "INVALID_SETTING: environment: 'untested' has no test tasks" in error
    assert not (loop.folder / "checkpoints" / "untested").exists()
    assert list((loop.folder / "weights").iterdir()) == published
    with pytest.raises(DomainError, match="'untested' has no test tasks") as caught:
        await client.evaluate("untested", EvaluationSettings())
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == "environment"


async def test_a_run_whose_folder_is_removed_ends_for_whoever_watches(loop: Loop, client: RunClient) -> None:
    await client.start("removed", small_run(steps=500))
    await stepped(client, "removed")
    shutil.rmtree(loop.folder / "runs", ignore_errors=True)
    async with asyncio.timeout(60):
        events = [entry.event async for entry in client.watch("removed")]
    expected = f"the folder of the run, or a file in it, was removed: {loop.folder / 'runs' / 'removed'}"
    assert events[-1] == StateEvent(RunState.FAILED, expected)
    (info,) = await client.runs()
    assert (info.run_id, info.state, info.error) == ("removed", RunState.FAILED, expected)
    await client.start("another", small_run(steps=1))
    await loop.ended(client, "another")


async def test_servers_that_differ_in_their_seed_alone(services: ServiceProcesses) -> None:
    first, other = [services.start("env", **offering(seed)) for seed in (0, 1)]
    client = connect(Endpoint(f"{first.address},{other.address}", outage_seconds=SECONDS), lost_seconds=0.5)
    try:
        with pytest.raises(DomainError, match="'frozenlake-3x3' is not the same at all servers: task 'train") as caught:
            await client.describe("frozenlake-3x3")
        assert caught.value.reason is Reason.ENVIRONMENT_UNAVAILABLE and other.address in caught.value.message
        assert (await client.describe("untested")).task_counts[Split.TEST] == 0, "what they agree in is offered"
        await asyncio.to_thread(come_back, other, 0)
        assert (await client.describe("frozenlake-3x3")).deterministic
    finally:
        await client.close()


async def test_a_server_that_comes_back_with_another_seed_is_not_used(services: ServiceProcesses) -> None:
    first, other = [services.start("env", **offering(0)) for _ in range(2)]
    told: list[str] = []
    address = f"{first.address},{other.address}"
    client = connect(Endpoint(address, outage_seconds=SECONDS), lost_seconds=0.5, on_outage=told.append)
    assert isinstance(client, EnvReplicas)
    try:
        tasks = await client.list_tasks("frozenlake-3x3", Split.TRAIN, 1)
        info = await client.describe("frozenlake-3x3")

        async def shown(number: int) -> str:
            episode = await client.start("frozenlake-3x3", tasks[0].task_id, f"{number}")
            await episode.end()
            return episode.observation

        (before,) = {await shown(number) for number in range(16)}
        other.kill()
        assert {await shown(number) for number in range(16, 64)} == {before}, "some of them found it away"
        await asyncio.to_thread(come_back, other, 1)
        for number in range(64, 10**6):
            assert await shown(number) == before
            if any("'frozenlake-3x3' is not the same" in text for text in told):
                break
            await asyncio.sleep(0.02)
        assert await client.describe("frozenlake-3x3") == info, "the others go on"
        await asyncio.to_thread(come_back, first, 1)
        async with asyncio.timeout(SECONDS):
            while (await client.describe("frozenlake-3x3")) != info:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert await shown(5000) != before, "all have it: it is for the caller to notice"
    finally:
        await client.close()
