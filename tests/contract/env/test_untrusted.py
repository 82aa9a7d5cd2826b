"""Untrusted environments over gRPC: what their code does ends its own episode, and nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import uuid4

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.types import Outcome, Split
from mulligan.env.client import EnvClient, RemoteEpisode
from mulligan.testing.chained import Chain
from mulligan.testing.processes import ProcessFailed, ServiceProcess, ServiceProcesses
from tests.support.processes import identity, number_of
from tests.support.processes import inside_runs as runs
from tests.support.waiting import wait_until

HOSTILE = {"kind": "tests.support.hostile", "untrusted": True, "memory_mb": 128}
TIMEOUT = 2.5
PATIENCE = 30.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - processes tell nobody
            await asyncio.sleep(0.01)


def seen(folder: Path) -> set[str]:
    """The identities of all processes in which code of the environment ran."""
    return {path.name for path in folder.iterdir()}


def kill(process: str) -> None:
    number = number_of(process)
    assert number is not None
    os.kill(number, signal.SIGKILL)


# What its code does, and what the episode's error says of it.
WHAT_IT_DOES = [
    ("raise", "RuntimeError: the ice broke"),
    ("sys.exit", "SystemExit: bye"),
    ("exit", "its process exited with status 3"),
    ("segfault", "its process ended with signal 11 (SIGSEGV)"),
    ("abort", "its process ended with signal 6 (SIGABRT)"),
    ("eat", "used more than memory_mb = 128"),
    ("nibble", "used more than memory_mb = 128"),
    ("garbage", "its process wrote an invalid answer"),
    ("announce", "its process announced an answer of 4294967295 bytes"),
    ("hang up", "its process ended with signal 9 (SIGKILL)"),
    ("huge", "its process has an answer of 17825"),
    ("surrogate", "UnicodeEncodeError"),
    ("recurse", "RecursionError"),
    ("hang", "not finished within 2.5 s"),
    ("spin", "not finished within 2.5 s"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seen")


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses, folder: Path) -> ServiceProcess:
    return shared_services.start(
        "env",
        environment={"CLOUD_SECRET": "s3cr3t"},
        step_timeout_seconds=TIMEOUT,
        environments={
            "hostile": {**HOSTILE, "folder": str(folder)},
            "free": {**HOSTILE, "folder": str(folder), "subprocesses": True},
            "chained": {"kind": "mulligan.testing.chained", "max_steps": 100_000},
            "lake": {"kind": "frozenlake", "test_tasks": 20},
            "fenced-lake": {"kind": "frozenlake", "test_tasks": 20, "untrusted": True, "feedback": "unary"},
        },
    )


@pytest.fixture
async def client(server: ServiceProcess) -> AsyncIterator[EnvClient]:
    client = EnvClient(Endpoint(server.address))
    yield client
    await client.close()


async def start(client: EnvClient, name: str = "hostile") -> RemoteEpisode:
    return await client.start(name, "begin", uuid4().hex)


class Neighbours:
    """An episode of the same environment and one of a trusted one, which play on whatever happens."""

    def __init__(self, same: RemoteEpisode, trusted: RemoteEpisode) -> None:
        self.same = same
        self.trusted = trusted
        self._chain = Chain(trusted.observation)
        self._said: list[str] = []

    @classmethod
    async def arrive(cls, client: EnvClient, name: str) -> Neighbours:
        return cls(await start(client, name), await client.start("chained", "plain", uuid4().hex))

    async def play(self) -> None:
        action = f"{len(self._said)}"
        self._said.append(action)
        same, trusted = await asyncio.gather(self.same.step(action), self.trusted.step(action))
        assert same.observation == "-".join(self._said)
        assert trusted.observation == self._chain.after(action)

    async def leave(self) -> None:
        await asyncio.gather(self.same.end(), self.trusted.end())


@pytest.mark.parametrize(
    ("name", "action", "words"),
    [("hostile", *case) for case in WHAT_IT_DOES] + [("free", *case) for case in WHAT_IT_DOES[2:6]],
)
async def test_what_its_code_does_ends_one_episode(client: EnvClient, name: str, action: str, words: str) -> None:
    neighbours = await Neighbours.arrive(client, name)
    episode = await start(client, name)
    process = (await episode.step("pid")).observation.split()[0]
    failing = asyncio.create_task(episode.step(action))
    while not failing.done():
        await neighbours.play()
        await asyncio.sleep(0.01)
    answer = await failing
    assert (answer.done, answer.reward) == (True, None)
    assert answer.outcome is (Outcome.TIMEOUT if action in ("hang", "spin") else Outcome.ENV_ERROR), answer.error
    assert words in answer.error
    await until(lambda: not runs(process))
    await neighbours.play()
    await neighbours.leave()


async def test_what_it_may_not_do_is_refused_to_it(client: EnvClient) -> None:
    episode = await start(client)
    assert (await episode.step("bomb")).observation == "no more: Operation not permitted"
    assert (await episode.step("thread")).observation == "threaded"
    assert (await episode.step("chatter")).observation == "said"
    assert (await episode.step("reach")).observation == ""
    assert (await episode.step("connect")).observation == "Operation not permitted"
    assert (await episode.step("capabilities")).observation == "0" * 16
    for action in ("child", "kill parent"):
        refused = await start(client)
        assert "PermissionError" in (await refused.step(action)).error
    assert (await episode.step("some memory")).observation == f"{32 * 2**20}"
    await episode.end()


async def test_it_gets_none_of_the_servers_variables(client: EnvClient) -> None:
    episode = await start(client)
    names = (await episode.step("variables")).observation.split()
    assert names == ["LANG", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "PATH", "PYTHONPATH"]
    await episode.end()


def test_the_log_says_what_protects_the_server(server: ServiceProcess) -> None:
    told = [line for line in server.log_lines if line["event"].startswith("an untrusted environment ")]
    told = [line for line in told if not line["event"].endswith("loaded again")]
    assert [line["environment"] for line in told] == ["hostile", "free", "fenced-lake"]
    for line in told:
        assert line["network"] == "refused"
        is_whole = line["namespaces"] == "user mount ipc network pid"
        assert (line["level"], "reason" in line) == (("info", False) if is_whole else ("warning", True))


async def test_the_server_runs_none_of_its_code(server: ServiceProcess, client: EnvClient, folder: Path) -> None:
    await client.list_tasks("hostile", Split.TRAIN, 0)
    assert server.process is not None
    assert identity(server.process.pid, server.process.pid) not in seen(folder) and len(seen(folder)) > 2


@pytest.mark.parametrize(
    ("task_id", "words"),
    [
        ("exit", "its process exited with status 3"),
        ("raise", "RuntimeError: the ice broke"),
        ("eat", "used more than memory_mb = 128"),
        ("hang", "not finished within 2.5 s"),
    ],
)
async def test_a_start_that_fails_leaves_no_process(client: EnvClient, folder: Path, task_id: str, words: str) -> None:
    before = seen(folder)
    with pytest.raises(DomainError) as caught:
        await client.start("hostile", task_id, uuid4().hex)
    assert caught.value.reason is Reason.ENVIRONMENT_FAILED and words in caught.value.message
    (process,) = seen(folder) - before
    await until(lambda: not runs(process))


async def test_tasks_are_listed_by_a_process_too(client: EnvClient) -> None:
    assert [task.task_id for task in await client.list_tasks("hostile", Split.TRAIN, 0)] == [
        f"task {number}" for number in range(3)
    ]
    with pytest.raises(CallFailed, match="incident"):
        await client.list_tasks("hostile", Split.TEST, 0)
    with pytest.raises(DomainError) as caught:
        await client.start("fenced-lake", "train/999999", uuid4().hex)
    assert caught.value.reason is Reason.UNKNOWN_TASK


async def test_a_process_that_is_killed_in_the_middle_of_a_step_is_named(client: EnvClient) -> None:
    neighbours = await Neighbours.arrive(client, "hostile")
    episode = await start(client)
    process = (await episode.step("pid")).observation.split()[0]
    step = asyncio.create_task(episode.step("hang"))
    await neighbours.play()
    kill(process)
    answer = await step
    assert answer.outcome is Outcome.ENV_ERROR and answer.error == "its process ended with signal 9 (SIGKILL)"
    await neighbours.play()
    await neighbours.leave()


@pytest.mark.parametrize("name", ["hostile", "free"])
async def test_the_process_that_forks_episodes_is_replaced(client: EnvClient, name: str) -> None:
    trusted = await client.start("chained", "plain", uuid4().hex)
    chain = Chain(trusted.observation)
    idle = await start(client, name)
    hanging = await start(client, name)
    process, host = (await hanging.step("pid")).observation.split()
    step = asyncio.create_task(hanging.step("hang"))
    assert (await trusted.step("a")).observation == chain.after("a")
    before = number_of(host)
    kill(host)
    words = "the process that loaded the environment ended with signal 9 (SIGKILL)"
    for answer in (await step, await idle.step("a")):
        assert (answer.outcome, answer.error) == (Outcome.ENV_ERROR, words)
    await until(lambda: not runs(process))
    again = await start(client, name)
    assert number_of((await again.step("pid")).observation.split()[1]) not in (None, before)
    assert (await trusted.step("b")).observation == chain.after("b")
    await again.end()


async def test_it_plays_as_a_trusted_one_does(client: EnvClient) -> None:
    fenced = await client.describe("fenced-lake")
    lake = await client.describe("lake")
    assert fenced.prompts == lake.prompts and fenced.task_counts == lake.task_counts
    assert (fenced.description, fenced.can_fork) == (f"{lake.description}; unary feedback", False)
    tasks = await client.list_tasks("lake", Split.TEST, 0)
    assert tasks == await client.list_tasks("fenced-lake", Split.TEST, 0)
    for task in tasks[:5]:
        ours, theirs = [await client.start(name, task.task_id, uuid4().hex) for name in ("lake", "fenced-lake")]
        assert ours.observation == theirs.observation
        step = None
        while step is None or not step.done:
            step, other = await asyncio.gather(*(episode.step("```Right```") for episode in (ours, theirs)))
            assert (step.observation, step.action, step.reward) == (other.observation, other.action, other.reward)
        assert other.feedback in ("That was right.", "That was wrong, try again.")


async def test_a_process_is_copied_as_it_is(client: EnvClient) -> None:
    source = await start(client, "free")
    await source.step("a")
    copies = [await source.fork(uuid4().hex) for _ in range(2)]
    copies.append(await copies[0].fork(uuid4().hex))
    said = await asyncio.gather(*(episode.step(f"{n}") for n, episode in enumerate([source, *copies])))
    assert [answer.observation for answer in said] == [f"a-{n}" for n in range(4)]
    processes = [(await episode.step("pid")).observation.split()[0] for episode in (source, *copies)]
    assert len(set(processes)) == 4
    assert (await source.step("segfault")).error == "its process ended with signal 11 (SIGSEGV)"
    assert (await copies[1].step("eat")).error == "used more than memory_mb = 128"
    assert [runs(process) for process in processes][1::2] == [True, True]
    for copy in copies:
        await copy.end()
    await until(lambda: not any(map(runs, processes)))


async def test_what_an_episode_started_ends_with_it(client: EnvClient) -> None:
    episode = await start(client, "free")
    neighbour = await start(client, "free")
    started = [(await episode.step(action)).observation for action in ("child", "apart", "orphan")]
    kept = [(await neighbour.step(action)).observation for action in ("child", "apart", "orphan")]
    assert all(map(runs, started))
    await episode.end()
    await until(lambda: not any(map(runs, started)))
    assert all(map(runs, kept))
    await neighbour.end()
    await until(lambda: not any(map(runs, kept)))


@pytest.mark.parametrize("how", ["ended", "expired", "SIGTERM", "SIGKILL"])
async def test_nothing_is_left_when_episodes_or_the_server_end(
    services: ServiceProcesses, tmp_path: Path, how: str
) -> None:
    hostile = {**HOSTILE, "folder": str(tmp_path)}
    server = services.start(
        "env",
        environments={"hostile": hostile, "free": hostile | {"subprocesses": True}},
        lease_seconds=1.0 if how == "expired" else 600.0,
    )
    hosts = seen(tmp_path)
    client = EnvClient(Endpoint(server.address, outage_seconds=0))
    episodes = [await start(client, name) for name in ("hostile", "hostile", "free")]
    child = (await episodes[2].step("child")).observation
    assert runs(child) and all(map(runs, seen(tmp_path))) and len(seen(tmp_path)) == 5
    hanging = asyncio.create_task(episodes[1].step("spin")) if how.startswith("SIG") else None
    if hanging is not None:
        await asyncio.sleep(0.2)
    if how == "ended":
        for episode in episodes:
            await episode.end()
    elif how == "SIGKILL":
        server.kill()
    elif how == "SIGTERM":
        for episode in episodes[::2]:
            await episode.end()
        server.terminate()
        server.terminate()
    left = hosts if how in ("ended", "expired") else set()
    await until(lambda: {process for process in seen(tmp_path) if runs(process)} == left and not runs(child))
    if hanging is not None:
        hanging.cancel()
    await client.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"untrusted": "yes"}, r"environments\.x\.untrusted: expected true or false, not 'yes'"),
        ({"memory_mb": 0}, r"environments\.x: .*memory_mb must be at least 1, not 0"),
        ({"at_load": "refuses"}, r"environments\.x: .*at_load: it refuses"),
        ({"at_load": "exit"}, r"environments\.x: the process that loaded the environment exited with status 3"),
        ({"at_load": "eat"}, r"environments\.x: loading it took more than memory_mb = 128"),
        ({"at_load": "hang", "load_seconds": 1.5}, r"environments\.x: .* did not answer within 1\.5 s"),
        ({"colour": "red"}, r"environments\.x: colour: no such setting"),
        ({"kind": "tests.support.nowhere"}, r"environments\.x\.kind: .*No module named"),
    ],
)
def test_what_cannot_be_loaded_stops_the_start(
    services: ServiceProcesses, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ProcessFailed, match=rf"ended with status 2:\senv: bad settings\s.*{words}"):
        services.start("env", environments={"x": {**HOSTILE, "folder": str(tmp_path), **changes}})
    wait_until(lambda: not any(map(runs, seen(tmp_path))), PATIENCE)


def test_what_is_not_installed_is_listed(services: ServiceProcesses) -> None:
    table = {"kind": "tests.support.environments", "missing": "ice", "untrusted": True}
    server = services.start("env", environments={"cold": table})
    (warned,) = (line for line in server.log_lines if line["event"] == "environment unavailable")
    assert "'.[ice]'" in warned["reason"]
