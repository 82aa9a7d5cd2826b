"""Environments that live behind another server: OpenEnv's own, from PyPI, and an environment server of ours."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from uuid import uuid4

import pytest
import pytest_asyncio
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from benchmarks.openenv import process as openenv_process
from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason, ServiceUnavailable
from mulligan.common.types import Outcome, Split
from mulligan.conformance.env.game import EnvOptions, Game
from mulligan.conformance.env.run import METHODS, target
from mulligan.conformance.report import Check, Verdict, judge
from mulligan.conformance.target import CheckSession
from mulligan.env.client import EnvClient
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from tests.contract.env.test_environments import CHECKS, MOVES, without
from tests.support.made import installed

LAKE = {"kind": "frozenlake", "train_tasks": 250, "test_tasks": 20}
TIC_TAC_TOE = {"kind": "textarena", "id": "TicTacToe-v0", "players": 2, "max_steps": 12, "train_tasks": 120}
SLEEPY = {"kind": "mulligan.testing.chained", "max_steps": 4}
KNOWN = {"openenv": MOVES, "remote": MOVES, "remote-players": ("[0]", "[4]", "[8]", "[1]")}


@pytest.fixture(scope="module")
def openenv() -> Iterator[str]:
    """The address of OpenEnv's own server, which plays FrozenLake."""
    installed("OPENENV", "openenv")
    with openenv_process.serving() as url:
        yield url


def openenv_table(url: str, **settings: object) -> dict[str, object]:
    shown = {"action": "text", "observation": ["text"], "feedback_field": "feedback"}
    return {"kind": "openenv", "url": url, "max_steps": 8, **shown, **settings}


@pytest.fixture(scope="module")
def upstream(shared_services: ServiceProcesses) -> ServiceProcess:
    environments = {"frozenlake": LAKE, "tic-tac-toe": TIC_TAC_TOE, "chained": SLEEPY}
    return shared_services.start("env", environments=environments)


@pytest.fixture(scope="module")
def openenv_server(shared_services: ServiceProcesses, openenv: str) -> ServiceProcess:
    table = openenv_table(openenv, deterministic=True, train_tasks=120, test_tasks=20)
    return shared_services.start("env", environments={"openenv": table})


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses, upstream: ServiceProcess) -> ServiceProcess:
    there = {"kind": "remote", "address": upstream.address}
    environments = {
        "remote": {**there, "environment": "frozenlake"},
        "remote-players": {**there, "environment": "tic-tac-toe"},
        "chained": there,
    }
    return shared_services.start("env", environments=environments)


@pytest.fixture
async def client(server: ServiceProcess) -> AsyncIterator[EnvClient]:
    client = EnvClient(Endpoint(server.address))
    yield client
    await client.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KNOWN)
async def game(request: pytest.FixtureRequest) -> AsyncIterator[Game]:
    """One of the environments of `KNOWN`, at a server that has it."""
    server = request.getfixturevalue("openenv_server" if request.param == "openenv" else "server")
    connected = target(server.address)
    listed = (await connected.connect(*METHODS)).environments
    info = next(info for info in listed if info.name == request.param)
    yield Game(CheckSession(connected), info, EnvOptions(known=KNOWN[request.param]))
    await connected.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.call}: {check.title}")
async def test_each_keeps_each_promise(game: Game, check: Check[Game]) -> None:
    result = await judge(check, game, game.info.name)
    expected = Verdict.NOT_APPLICABLE if check.body in without(game.info) else Verdict.PASSED
    assert result.verdict is expected, result


async def test_a_chain_shows_what_is_at_its_end(client: EnvClient, upstream: ServiceProcess) -> None:
    there = EnvClient(Endpoint(upstream.address))
    infos = {info.name: info for info in await there.list_environments()}
    chained = {info.name: info for info in await client.list_environments()}
    for name, original in (("remote", "frozenlake"), ("remote-players", "tic-tac-toe")):
        assert chained[name].prompts == infos[original].prompts
        assert chained[name].player_count == infos[original].player_count
        for split in Split:
            assert await client.list_tasks(name, split, 0) == await there.list_tasks(original, split, 0)
    await there.close()


async def test_sixty_four_episodes_at_once_through_the_chain(client: EnvClient) -> None:
    """Each shows a chain of hashes over its own actions: nothing is mixed up, lost or done twice."""
    from mulligan.testing.chained import Chain

    async def play(number: int) -> int:
        episode = await client.start("chained", "plain", f"chain-{uuid4()}")
        expected = Chain(episode.observation)
        for step in range(4):
            action = f"action {step} of {number}"
            answer = await episode.step(action)
            assert answer.observation == expected.after(action)
        assert answer.done
        return number

    assert await asyncio.gather(*(play(number) for number in range(64))) == list(range(64))


async def test_what_ends_here_ends_there(services: ServiceProcesses) -> None:
    """The server at the end of the chain has one place."""
    there = services.start("env", environments={"frozenlake": LAKE}, max_episodes=1)
    table = {"kind": "remote", "address": there.address, "outage_seconds": 0.2}
    here = services.start("env", environments={"frozenlake": table})
    client = EnvClient(Endpoint(here.address, outage_seconds=0.1))
    (task,) = await client.list_tasks("frozenlake", Split.TRAIN, 1)
    first = await client.start("frozenlake", task.task_id, "first")
    with pytest.raises(ServiceUnavailable, match="1 episodes are live") as caught:
        await client.start("frozenlake", task.task_id, "second")
    assert caught.value.refusal is not None and caught.value.refusal.reason is Reason.CAPACITY_REACHED
    with pytest.raises(ServiceUnavailable, match="1 episodes are live"):
        await first.fork("copy")
    await first.end()
    patient = EnvClient(Endpoint(here.address))
    await (await patient.start("frozenlake", task.task_id, "third")).end()
    await patient.close()
    await client.close()


async def test_a_server_that_is_away_at_first_and_lost_later(services: ServiceProcesses) -> None:
    there = services.start("env", environments={"frozenlake": LAKE})
    there.kill()
    table = {"kind": "remote", "address": there.address, "outage_seconds": 0.5, "feedback": "unary"}
    here = services.start("env", environments={"frozenlake": table})
    client = EnvClient(Endpoint(here.address, outage_seconds=0.5))
    info = await client.describe("frozenlake")
    assert there.address in info.unavailable
    with pytest.raises(DomainError) as caught:
        await client.start("frozenlake", "train/00000", "early")
    assert caught.value.reason is Reason.ENVIRONMENT_UNAVAILABLE
    there.start()
    for _ in range(1000):  # it asks again every two seconds
        if not (await client.describe("frozenlake")).unavailable:
            break
        await asyncio.sleep(0.1)
    episode = await client.start("frozenlake", "train/00000", "late")
    assert "unary feedback" in (await client.describe("frozenlake")).description
    there.restart()
    answer = await episode.step(MOVES[0])
    assert answer.outcome is Outcome.ENV_ERROR and answer.reward is None
    assert "UNKNOWN_EPISODE" in answer.error
    episode = await client.start("frozenlake", "train/00000", "later")
    there.kill()
    answer = await episode.step(MOVES[0])
    assert answer.outcome is Outcome.ENV_ERROR and there.address in answer.error
    await client.close()


async def test_what_fails_there_fails_here_in_the_same_way(services: ServiceProcesses) -> None:
    awkward = {"kind": "tests.support.environments", "hang_seconds": 10.0}
    there = services.start("env", environments={"awkward": awkward}, step_timeout_seconds=3.0)
    remote = {"kind": "remote", "address": there.address, "environment": "awkward"}
    tables = {"patient": remote, "hasty": {**remote, "timeout_seconds": 2.0}}
    client = EnvClient(Endpoint(services.start("env", environments=tables).address))
    for name, task, outcome, said in (
        ("patient", "raises", Outcome.ENV_ERROR, "RuntimeError, incident "),
        ("patient", "hangs", Outcome.TIMEOUT, "not finished within 3 s"),
        ("hasty", "hangs", Outcome.TIMEOUT, f"{there.address} did not answer within 2 s"),
    ):
        answer = await (await client.start(name, task, str(uuid4()))).step("go")
        assert answer.outcome is outcome and answer.reward is None
        assert said in answer.error, answer.error
    await client.close()


async def test_openenv_sees_what_the_lake_shows(openenv_server: ServiceProcess, upstream: ServiceProcess) -> None:
    client = EnvClient(Endpoint(openenv_server.address))
    lake = EnvClient(Endpoint(upstream.address))
    for number in range(3):
        one = await client.start("openenv", f"train/{number:05d}", str(uuid4()))
        other = await lake.start("frozenlake", f"train/{number:05d}", str(uuid4()))
        assert one.observation == other.observation
        for move in MOVES * 2:
            answer = await one.step(move)
            expected = await other.step(move)
            assert (answer.observation, answer.reward, answer.done) == (
                expected.observation,
                expected.reward,
                expected.done,
            )
            if answer.done:
                assert answer.feedback == expected.feedback
                break
    await client.close()
    await lake.close()


async def test_an_action_written_as_json_and_one_that_does_not_fit(services: ServiceProcesses, openenv: str) -> None:
    table = openenv_table(openenv, action="", train_tasks=[{"task_id": "train/00007"}], max_steps=3)
    client = EnvClient(Endpoint(services.start("env", environments={"lake": table}).address))
    episode = await client.start("lake", "train/00000", "json")
    answer = await episode.step('I go:\n```json\n{"text": "nowhere"}\n```')
    assert "(invalid)" not in answer.action and not answer.done
    answer = await episode.step('{"txt": "```Up```"}')
    assert answer.observation.startswith("The action is invalid: ") and "text" in answer.observation
    answer = await episode.step("Up!")
    assert answer.observation == "The action is invalid: expected a JSON object"
    assert answer.outcome is Outcome.TRUNCATED and answer.reward == 0.0
    await client.close()


class Script:
    """An OpenEnv server that answers as a test wants. It does not belong to OpenEnv."""

    def __init__(self) -> None:
        self.late = threading.Event()
        self.connections = 0
        self.closed = threading.Semaphore(0)

    def handle(self, connection: ServerConnection) -> None:
        try:
            with suppress(ConnectionClosed):  # before a late answer
                self._talk(connection)
        finally:
            self.closed.release()

    def _talk(self, connection: ServerConnection) -> None:
        self.connections += 1
        number = self.connections
        steps = 0
        if connection.request is not None and connection.request.path == "/full/ws":
            error = {"message": "all of 1 sessions are taken", "code": "CAPACITY_REACHED"}
            connection.send(json.dumps({"type": "error", "data": error}))
            return
        for raw in connection:
            message = json.loads(raw)
            if message["type"] == "close":
                return
            steps += message["type"] == "step"
            if message["data"].get("text") == "late":
                self.late.wait(30)
            shown = {"observation": {"text": f"session {number} step {steps}"}, "reward": 0, "done": False}
            connection.send(json.dumps({"type": "observation", "data": shown}))


@pytest.fixture
def scripted() -> Iterator[tuple[Script, str]]:
    script = Script()
    with serve(script.handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        host, port = server.socket.getsockname()[:2]
        yield script, f"{host}:{port}"
        script.late.set()
        server.shutdown()
        thread.join()


async def test_a_late_answer_is_nobodys(services: ServiceProcesses, scripted: tuple[Script, str]) -> None:
    script, address = scripted
    tables = {"slow": openenv_table(f"http://{address}", timeout_seconds=2.0, feedback_field="")}
    client = EnvClient(Endpoint(services.start("env", environments=tables).address))
    episode = await client.start("slow", "train/00000", "first")
    other = await client.start("slow", "train/00000", "second")
    answer = await episode.step("late")
    assert answer.outcome is Outcome.TIMEOUT and answer.reward is None
    assert address in answer.error and "within 2 s" in answer.error
    script.late.set()
    with pytest.raises(DomainError) as caught:
        await episode.step("next")
    assert caught.value.reason is Reason.EPISODE_FINISHED
    assert (await other.step("next")).observation == "session 2 step 1"
    await other.end()
    for _ in range(2):  # both connections are closed
        assert await asyncio.to_thread(script.closed.acquire, timeout=30)
    await client.close()


async def test_a_full_server_and_none(services: ServiceProcesses, scripted: tuple[Script, str]) -> None:
    _, address = scripted
    tables = {
        "full": openenv_table(f"http://{address}/full"),
        "none": openenv_table("http://127.0.0.1:1", token_env="LAKE_TOKEN"),
    }
    server = services.start("env", environments=tables, environment={"LAKE_TOKEN": "a-token-of-no-one"})
    client = EnvClient(Endpoint(server.address, outage_seconds=0.1))
    with pytest.raises(Exception, match="is full: incident "):
        await client.start("full", "train/00000", "full")
    with pytest.raises(
        DomainError, match=r"no OpenEnv server at http://127\.0\.0\.1:1: ConnectionRefusedError"
    ) as caught:
        await client.start("none", "train/00000", "none")
    assert caught.value.reason is Reason.ENVIRONMENT_FAILED
    assert "a-token-of-no-one" not in server.log + str(caught.value)
    await client.close()


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"kind": "openenv", "url": "127.0.0.1:8000"}, "url must be of the form"),
        ({"kind": "openenv", "url": "http://me:secret@host"}, "url must hold no credentials"),
        ({"kind": "openenv", "url": "http://host", "action": {"text": "x"}}, "action must have the text {action}"),
        ({"kind": "openenv", "url": "http://host", "token_env": "NO_SUCH"}, "token_env: there is no variable NO_SUCH"),
        ({"kind": "remote", "address": "nowhere"}, "expected host:port"),
        ({"kind": "remote", "address": "host:1", "token_env": "NO_SUCH"}, "token_env: there is no variable NO_SUCH"),
    ],
)
def test_settings_are_refused_by_name(table: dict[str, object], problem: str) -> None:
    from mulligan.env.load import load

    with pytest.raises(ValueError, match=r"environments\.one: ") as caught:
        load("one", table)
    assert problem in str(caught.value) and "secret" not in str(caught.value)
