"""The contract of the environment service itself: exactly-once steps, leases, capacity, and environments that fail."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from uuid import uuid4

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import Outcome, Split
from mulligan.common.v1 import outcome_pb2
from mulligan.env.client import EnvClient, RemoteEpisode
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from mulligan.testing.processes import ProcessFailed, ServiceProcess, ServiceProcesses
from tests.support.environments import MAX_STEPS, MEETING, TASKS
from tests.support.waiting import until

AWKWARD = {"kind": "tests.support.environments", "hang_seconds": 5.0}
TIMEOUT = 1.5
SOUND = ("good", "waits", "meets")
BREAKING = [task for task in TASKS if task not in SOUND and not task.endswith("-at-start")]


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses) -> ServiceProcess:
    environments = {"awkward": AWKWARD, "missing": {"kind": "tests.support.environments", "missing": "ice"}}
    return shared_services.start("env", environments=environments, step_timeout_seconds=TIMEOUT)


@pytest.fixture
async def client(server: ServiceProcess) -> AsyncIterator[EnvClient]:
    client = EnvClient(Endpoint(server.address))
    yield client
    await client.close()


@pytest.fixture
async def stub(server: ServiceProcess) -> AsyncIterator[pb_grpc.EnvServiceStub]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.EnvServiceStub(channel)


async def start(client: EnvClient, task_id: str = "good", episode_id: str = "") -> RemoteEpisode:
    return await client.start("awkward", task_id, episode_id or str(uuid4()))


async def test_what_is_not_installed_is_listed_and_says_what_installs_it(
    server: ServiceProcess, client: EnvClient
) -> None:
    (warned,) = (line for line in server.log_lines if line["event"] == "environment unavailable")
    assert warned["environment"] == "missing" and "'.[ice]'" in warned["reason"]
    listed = {info.name: info for info in await client.list_environments()}
    assert listed["awkward"].unavailable == "" and "'.[ice]'" in listed["missing"].unavailable
    assert await client.list_tasks("missing", Split.TRAIN, 0) == []
    with pytest.raises(DomainError, match=r"pip install -e '\.\[ice\]'") as caught:
        await client.start("missing", "good", str(uuid4()))
    assert caught.value.reason is Reason.ENVIRONMENT_UNAVAILABLE


async def test_unknown_names_are_not_found(client: EnvClient) -> None:
    with pytest.raises(DomainError, match="there are: awkward, missing") as caught:
        await client.start("chess", "good", "e")
    assert caught.value.reason is Reason.UNKNOWN_ENVIRONMENT
    with pytest.raises(DomainError) as caught:
        await client.list_tasks("chess", Split.TRAIN, 1)
    assert caught.value.reason is Reason.UNKNOWN_ENVIRONMENT
    with pytest.raises(DomainError) as caught:
        await client.describe("chess")
    assert caught.value.reason is Reason.UNKNOWN_ENVIRONMENT
    with pytest.raises(DomainError) as caught:
        await client.step("never-started", 0, "a")
    assert caught.value.reason is Reason.UNKNOWN_EPISODE
    await client.end("never-started")


async def test_steps_out_of_order_are_refused(client: EnvClient) -> None:
    episode = await start(client)
    await episode.step("a")
    with pytest.raises(DomainError) as caught:
        await client.step(episode.episode_id, 2, "c")
    assert (caught.value.reason, caught.value.metadata) == (Reason.STEP_SKIPPED, {"next_step_index": "1"})
    with pytest.raises(DomainError) as caught:
        await client.step(episode.episode_id, 0, "another")
    assert caught.value.reason is Reason.STEP_CONFLICT


async def test_an_episode_that_is_over_stays_repeatable(client: EnvClient) -> None:
    episode = await start(client)
    steps = [await episode.step(f"{n}") for n in range(MAX_STEPS)]
    assert (steps[-1].done, steps[-1].outcome, steps[-1].feedback) == (True, Outcome.COMPLETED, "over")
    with pytest.raises(DomainError) as caught:
        await episode.step("more")
    assert caught.value.reason is Reason.EPISODE_FINISHED
    await episode.end()
    assert [await client.step(episode.episode_id, n, f"{n}") for n in range(MAX_STEPS)] == steps
    await client.end(episode.episode_id)
    with pytest.raises(DomainError) as caught:
        await client.step(episode.episode_id, 0, "0")
    assert caught.value.reason is Reason.UNKNOWN_EPISODE


@pytest.mark.parametrize("task_id", BREAKING)
async def test_a_broken_environment_breaks_one_episode(client: EnvClient, task_id: str) -> None:
    episode, *others = [await start(client, task) for task in (task_id, "good", "good", "good")]
    assert (await episode.step("well")).reward == 0.0
    broken, *fine = await asyncio.gather(*(e.step("a") for e in (episode, *others)))
    assert [step.observation for step in fine] == ["1: a"] * 3
    outcome = Outcome.TIMEOUT if task_id == "hangs" else Outcome.ENV_ERROR
    assert (broken.done, broken.outcome, broken.reward) == (True, outcome, None)
    assert broken.error and "the ice" not in broken.error
    assert await client.step(episode.episode_id, 1, "a") == broken
    with pytest.raises(DomainError) as caught:
        await client.step(episode.episode_id, 2, "a")
    assert caught.value.reason is Reason.EPISODE_FINISHED


@pytest.mark.parametrize(
    ("task_id", "words"),
    [("raises-at-start", "RuntimeError, incident "), ("hangs-at-start", "not finished within 1.5 s")],
)
async def test_an_episode_that_cannot_start_says_so(client: EnvClient, task_id: str, words: str) -> None:
    episode_id = str(uuid4())
    with pytest.raises(DomainError, match=words) as caught:
        await start(client, task_id, episode_id)
    assert caught.value.reason is Reason.ENVIRONMENT_FAILED
    assert (await start(client, "good", episode_id)).observation == "begin"


async def test_what_environment_code_raises_is_for_the_log(server: ServiceProcess, client: EnvClient) -> None:
    """It may quote anything that the process knows. Callers get the incident by which the log has it."""
    with pytest.raises(DomainError) as caught:
        await start(client, "raises-at-start", "unlucky")
    step = await (await start(client, "raises", "luckless")).step("a")
    for told, episode_id, said in ((caught.value.message, "unlucky", "no ice"), (step.error, "luckless", "the ice")):
        found = re.search("RuntimeError, incident ([0-9a-f]{8}): the server's log has it$", told)
        assert found is not None and said not in told
        [line] = [line for line in server.log_lines if line.get("incident") == found[1]]
        assert (line["environment"], line["episode_id"]) == ("awkward", episode_id)
        assert said in line["exception"] and "Traceback" in line["exception"]


async def test_a_slow_step_holds_up_no_other(client: EnvClient) -> None:
    slow = await start(client, "hangs")
    fast = await start(client)
    slow_step = asyncio.create_task(slow.step("a"))
    await fast.step("a")
    assert not slow_step.done()
    assert (await slow_step).outcome is Outcome.TIMEOUT


async def test_slow_steps_run_side_by_side(services: ServiceProcesses) -> None:
    """None of the eight ends before all have begun."""
    client = EnvClient(Endpoint(services.start("env", environments={"awkward": AWKWARD}).address))
    episodes = await asyncio.gather(*(start(client, "meets") for _ in range(MEETING.parties)))
    answers = await asyncio.gather(*(episode.step("a") for episode in episodes))
    assert [answer.observation for answer in answers] == ["1: a"] * MEETING.parties
    await client.close()


async def test_a_batch_answers_item_by_item(client: EnvClient, stub: pb_grpc.EnvServiceStub) -> None:
    good = await start(client)
    slow = await start(client, "hangs")
    request = pb.StepEpisodesRequest(
        steps=[
            pb.StepEpisodeRequest(episode_id="nobody", action="a"),
            pb.StepEpisodeRequest(episode_id=good.episode_id, action="a"),
            pb.StepEpisodeRequest(episode_id=slow.episode_id, action="a"),
        ]
    )
    request.max_wait.FromMilliseconds(250)
    items = (await stub.StepEpisodes(request)).items
    assert [item.WhichOneof("result") for item in items] == ["error", "step", "pending"]
    assert (items[0].error.code, items[0].error.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "UNKNOWN_EPISODE")
    request.ClearField("max_wait")
    again = (await stub.StepEpisodes(request)).items
    assert again[1] == items[1]
    assert again[2].step.outcome == outcome_pb2.OUTCOME_TIMEOUT


async def test_one_bad_item_spoils_no_other(client: EnvClient) -> None:
    good = [await start(client) for _ in range(3)]
    steps = [client.step(episode.episode_id, 0, "a") for episode in good]
    bad = [client.step(good[0].episode_id, -1, "a"), client.step("", 0, "a"), client.step("nobody", 0, "a")]
    answers = await asyncio.gather(*steps, *bad, return_exceptions=True)
    assert [getattr(answer, "observation", None) for answer in answers[:3]] == ["1: a"] * 3
    reasons = [answer.reason for answer in answers[3:] if isinstance(answer, DomainError)]
    assert reasons == [Reason.INVALID_FIELD, Reason.INVALID_FIELD, Reason.UNKNOWN_EPISODE]


async def test_a_restarted_server_knows_no_episode(services: ServiceProcesses) -> None:
    server = services.start("env")
    outages: list[str] = []
    client = EnvClient(Endpoint(server.address), on_outage=outages.append)
    episode = await client.start("frozenlake", "train/00000", "e")
    await episode.step("hm")
    server.kill()
    waiting = asyncio.create_task(episode.step("hm"))
    await until(lambda: bool(outages))
    server.restart()
    with pytest.raises(DomainError) as caught:
        await waiting
    assert caught.value.reason is Reason.UNKNOWN_EPISODE
    assert (await client.start("frozenlake", "train/00000", "e")).observation == episode.observation
    await client.close()


async def test_capacity_is_visible(services: ServiceProcesses) -> None:
    server = services.start("env", max_episodes=2, lease_seconds=600.0, environments={"awkward": AWKWARD})
    client = EnvClient(Endpoint(server.address))
    first = await start(client)
    _ = await start(client)
    async with grpc.aio.insecure_channel(server.address) as channel:
        request = pb.StartEpisodeRequest(episode_id="third", environment="awkward", task_id="good")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pb_grpc.EnvServiceStub(channel).StartEpisode(request)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await first.end()
        assert (await pb_grpc.EnvServiceStub(channel).StartEpisode(request)).lease.seconds == 600
    await client.close()


async def test_a_new_episode_gets_the_place_of_one_whose_lease_ends(services: ServiceProcesses) -> None:
    server = services.start("env", max_episodes=1, lease_seconds=1.0, environments={"awkward": AWKWARD})
    client = EnvClient(Endpoint(server.address))
    idle = await start(client)
    await start(client)  # waits
    with pytest.raises(DomainError) as caught:
        await idle.step("a")
    assert caught.value.reason is Reason.EPISODE_EXPIRED
    await client.close()


def test_bad_environment_settings_stop_the_start(services: ServiceProcesses) -> None:
    with pytest.raises(
        ProcessFailed, match=r"ended with status 2:\senv: bad settings\s.*environments\.x: size_mni: no such"
    ):
        services.start("env", environments={"x": {"kind": "frozenlake", "size_mni": 3}})
