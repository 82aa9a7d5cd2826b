"""Several env servers: episodes spread, stay where they began, are found by their id, and lost with their server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from mulligan.common.addresses import by_rank
from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason, ServiceUnavailable
from mulligan.common.types import Split
from mulligan.env.client import EnvClient, RemoteEpisode
from mulligan.env.config import EnvSettings
from mulligan.env.replicas import EnvReplicas, connect
from mulligan.testing.processes import ProcessFailed, ServiceProcess, ServiceProcesses
from tests.support.environments import MAX_STEPS

AWKWARD = {"kind": "tests.support.environments"}
CAPACITY = 16
SECONDS = 100.0


@pytest.fixture(scope="module")
def servers(shared_services: ServiceProcesses) -> list[ServiceProcess]:
    def start(_: int) -> ServiceProcess:
        return shared_services.start("env", environments={"awkward": AWKWARD}, max_episodes=CAPACITY)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(start, range(3)))


def client_of(servers: list[ServiceProcess], **options: Any) -> EnvReplicas:
    address = ",".join(server.address for server in servers)
    client = connect(Endpoint(address, outage_seconds=SECONDS), **({"lost_seconds": 0.5} | options))
    assert isinstance(client, EnvReplicas)
    return client


@pytest.fixture
async def client(servers: list[ServiceProcess]) -> AsyncIterator[EnvReplicas]:
    client = client_of(servers)
    yield client
    await client.close()


@pytest.fixture
async def direct(servers: list[ServiceProcess]) -> AsyncIterator[dict[str, EnvClient]]:
    """A client of each server alone."""
    clients = {server.address: EnvClient(Endpoint(server.address, outage_seconds=SECONDS)) for server in servers}
    yield clients
    for client in clients.values():
        await client.close()


async def start(client: EnvReplicas, episode_id: str = "") -> RemoteEpisode:
    return await client.start("awkward", "good", episode_id or str(uuid4()))


async def knows(client: EnvClient, episode_id: str) -> bool:
    """Without playing: a step that is far ahead is refused by whoever has the episode."""
    with pytest.raises(DomainError) as caught:
        await client.step(episode_id, 99, "a")
    return caught.value.reason in (Reason.STEP_SKIPPED, Reason.EPISODE_FINISHED)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not happened():  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.02)


def an_id_of(address: str, servers: list[ServiceProcess]) -> str:
    """One that prefers this server."""
    addresses = [server.address for server in servers]
    return next(found for found in iter(lambda: str(uuid4()), "") if by_rank(found, addresses)[0] == address)


async def test_one_address_is_the_plain_client() -> None:
    assert type(connect(Endpoint("127.0.0.1:1"))) is EnvClient


async def test_episodes_spread_and_stay_where_their_id_belongs(
    client: EnvReplicas, direct: dict[str, EnvClient], servers: list[ServiceProcess]
) -> None:
    assert (await client.describe("awkward")).max_steps == MAX_STEPS
    assert [info.name for info in await client.list_environments()] == ["awkward"]
    assert await client.list_tasks("awkward", Split.TRAIN, 2) == await direct[servers[0].address].list_tasks(
        "awkward", Split.TRAIN, 2
    )
    ids = [an_id_of(server.address, servers) for server in servers for _ in range(5)]
    episodes = await asyncio.gather(*(start(client, episode_id) for episode_id in ids))
    homes = {episode_id: by_rank(episode_id, direct)[0] for episode_id in ids}
    assert Counter(homes.values()) == dict.fromkeys(direct, 5)
    for episode_id, home in homes.items():
        assert [address for address in direct if await knows(direct[address], episode_id)] == [home]
    for turn in range(MAX_STEPS):
        answers = await asyncio.gather(*(episode.step(f"{turn}") for episode in episodes))
        assert {answer.observation for answer in answers} == {f"{turn + 1}: {turn}"}
    assert all(answer.done for answer in answers)


async def test_another_client_finds_an_episode_by_its_id(
    client: EnvReplicas, direct: dict[str, EnvClient], servers: list[ServiceProcess]
) -> None:
    episodes = [await start(client) for _ in range(6)]
    elsewhere = an_id_of(servers[0].address, servers)
    await direct[servers[1].address].start("awkward", "good", elsewhere)  # as if its own server had been full
    other = client_of(servers)
    try:
        for episode_id in [*(episode.episode_id for episode in episodes), elsewhere]:
            assert (await other.step(episode_id, 0, "a")).observation == "1: a"
            assert (await other.step(episode_id, 0, "a")).observation == "1: a", "exactly once"
            assert (await client.step(episode_id, 1, "b")).observation == "2: b"
        for episode_id in (*(episode.episode_id for episode in episodes), elsewhere):
            await other.end(episode_id)
            assert not any([await knows(server, episode_id) for server in direct.values()])
        for found in (client, other):
            with pytest.raises(DomainError, match="UNKNOWN_EPISODE"):
                await found.step(str(uuid4()), 0, "a")
        with pytest.raises(DomainError, match="FORK_UNSUPPORTED"):
            await other.fork((last := await start(client)).episode_id, 0, "copy")
        await last.end()
    finally:
        await other.close()


async def test_a_full_server_passes_new_episodes_on_and_when_all_are_full_they_wait(
    client: EnvReplicas, direct: dict[str, EnvClient], servers: list[ServiceProcess]
) -> None:
    ids = [an_id_of(servers[0].address, servers) for _ in range(3 * CAPACITY)]
    episodes = await asyncio.gather(*(start(client, episode_id) for episode_id in ids))
    for server in direct.values():
        assert sum([await knows(server, episode_id) for episode_id in ids]) == CAPACITY
    late = asyncio.create_task(start(client))
    await asyncio.wait([late], timeout=0.3)
    assert not late.done()
    await episodes[0].end()
    assert (await (await late).step("a")).observation == "1: a"
    impatient = connect(Endpoint(",".join(direct), outage_seconds=0.1))
    with pytest.raises(ServiceUnavailable, match="CAPACITY_REACHED"):
        await impatient.start("awkward", "good", str(uuid4()))
    await impatient.close()
    await asyncio.gather(*(episode.end() for episode in [*episodes[1:], await late]))


async def test_a_killed_server_loses_its_own_episodes_alone(
    client: EnvReplicas, direct: dict[str, EnvClient], servers: list[ServiceProcess]
) -> None:
    victim = servers[1]
    ids = [an_id_of(server.address, servers) for server in servers for _ in range(8)]
    episodes = await asyncio.gather(*(start(client, episode_id) for episode_id in ids))
    await asyncio.gather(*(episode.step("a") for episode in episodes))
    victim.kill()
    answers = await asyncio.gather(*(episode.step("b") for episode in episodes), return_exceptions=True)
    lost = [answer for answer in answers if isinstance(answer, BaseException)]
    assert answers[8:16] == lost and len(lost) == 8
    for error in lost:
        assert isinstance(error, DomainError) and error.reason is Reason.UNKNOWN_EPISODE
        assert f"is lost: {victim.address} was unreachable" in error.message
    for episode in episodes[8:16]:
        with pytest.raises(DomainError, match="UNKNOWN_EPISODE"):
            await episode.end()
    moved = [await start(client, an_id_of(victim.address, servers)) for _ in range(4)]
    assert [(await episode.step("a")).observation for episode in moved] == ["1: a"] * 4
    await asyncio.to_thread(victim.start)
    for _ in range(200):
        again = await start(client, an_id_of(victim.address, servers))
        if await knows(direct[victim.address], again.episode_id):
            break
        await again.end()
        await asyncio.sleep(0.05)
    else:
        pytest.fail("the server that came back is not used")
    assert [(await episode.step("b")).observation for episode in moved] == ["2: b"] * 4, "those stay where they are"
    with pytest.raises(DomainError, match="UNKNOWN_EPISODE"):
        await client.step(episodes[8].episode_id, 1, "b")
    await asyncio.gather(*(episode.end() for episode in [*episodes[:8], *episodes[16:], *moved, again]))


async def test_an_episode_that_may_have_started_twice_is_ended_where_it_is_not_played(
    client: EnvReplicas, direct: dict[str, EnvClient], servers: list[ServiceProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.describe("awkward")
    episode_id = an_id_of(servers[2].address, servers)
    original = EnvClient.start

    async def cut(self: EnvClient, environment: str, task_id: str, episode_id: str) -> RemoteEpisode:
        """The answer of the first server never arrives."""
        episode = await original(self, environment, task_id, episode_id)
        monkeypatch.setattr(EnvClient, "start", original)
        raise ServiceUnavailable(servers[2].address, 0.0, f"cut off after {episode.observation}")

    monkeypatch.setattr(EnvClient, "start", cut)
    episode = await start(client, episode_id)
    assert (await episode.step("a")).observation == "1: a"
    async with asyncio.timeout(SECONDS):
        while await knows(direct[servers[2].address], episode_id):  # noqa: ASYNC110 - another process forgets it
            await asyncio.sleep(0.02)
    other = client_of(servers)
    try:
        assert (await other.step(episode_id, 1, "b")).observation == "2: b"
    finally:
        await other.close()


async def test_servers_that_differ_are_told_apart(servers: list[ServiceProcess], services: ServiceProcesses) -> None:
    hasty = services.start("env", environments={"awkward": AWKWARD | {"feedback": "silent"}, "extra": AWKWARD})
    client = client_of([servers[0], hasty])
    try:
        with pytest.raises(DomainError) as caught:
            await client.describe("extra")
        assert caught.value.reason is Reason.UNKNOWN_ENVIRONMENT
        assert f"offered by {hasty.address} and not by {servers[0].address}" in caught.value.message
        with pytest.raises(DomainError, match="'awkward' is not the same at all servers: description is 'misb"):
            await client.list_environments()
        with pytest.raises(DomainError, match=r"no environment 'chess' at .*there are: awkward, extra"):
            await client.describe("chess")
    finally:
        await client.close()


def processes_of(server: ServiceProcess) -> dict[str, int]:
    """Its server processes, by address."""
    return {line["address"]: line["process"] for line in server.log_lines if line["event"] == "serving"}


async def test_several_processes_are_kept_running(services: ServiceProcesses) -> None:
    server = services.start("env", environments={"awkward": AWKWARD}, processes=2, drain_seconds=5)
    await until(lambda: any(line["event"] == "all processes serve" for line in server.log_lines))
    found = processes_of(server)
    (told,) = [line["address"] for line in server.log_lines if line["event"] == "all processes serve"]
    assert len(found) == 2 and len(set(found.values())) == 2
    client = connect(Endpoint(told, outage_seconds=SECONDS), lost_seconds=SECONDS)
    assert isinstance(client, EnvReplicas)
    try:
        episodes = [await start(client) for _ in range(16)]
        killed = by_rank(episodes[0].episode_id, found)[0]
        kept = [by_rank(episode.episode_id, found)[0] != killed for episode in episodes]
        os.kill(found[killed], signal.SIGKILL)
        answers = await asyncio.gather(*(episode.step("a") for episode in episodes), return_exceptions=True)
        assert [not isinstance(answer, BaseException) for answer in answers] == kept
        lost = [answer for answer in answers if isinstance(answer, DomainError)]
        assert {error.reason for error in lost} == {Reason.UNKNOWN_EPISODE} and len(lost) == kept.count(False)
        again = processes_of(server)
        assert again[killed] != found[killed] and again.keys() == found.keys()
        (died,) = [line for line in server.log_lines if line["event"] == "a process died and is started again"]
        assert (died["process"], died["address"], died["status"]) == (found[killed], killed, -signal.SIGKILL)
        assert (await (await start(client, episodes[0].episode_id)).step("a")).observation == "1: a"
    finally:
        await client.close()
    assert await asyncio.to_thread(server.stop) == 0
    for pid in again.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_processes_end_with_their_supervisor(services: ServiceProcesses) -> None:
    server = services.start("env", environments={"awkward": AWKWARD}, processes=2)
    await until(lambda: len(processes_of(server)) == 2)
    server.kill()
    for pid in processes_of(server).values():
        await until(lambda pid=pid: not _runs(pid))  # type: ignore[misc]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_settings_that_all_processes_refuse(services: ServiceProcesses, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProcessFailed, match=r"status 2(.|\n)*environments.x.kind: there is no environment 'nope'"):
        services.start("env", environments={"x": {"kind": "nope"}}, processes=2)
    with pytest.raises(SystemExit):
        EnvSettings.load(["--port", "65534", "--processes", "3"])
    assert "processes: 3 of them need ports above 65535, from port = 65534" in " ".join(capsys.readouterr().err.split())
