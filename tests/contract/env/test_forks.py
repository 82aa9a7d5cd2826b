"""ForkEpisode over gRPC: a copy goes on as its source does, and neither sees what the other is told."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import EpisodeStep, Split
from mulligan.env.client import EnvClient, RemoteEpisode
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from mulligan.testing.chained import Chain
from mulligan.testing.processes import ServiceProcess, ServiceProcesses

ENVIRONMENTS: dict[str, dict[str, object]] = {
    "frozenlake": {"kind": "frozenlake", "test_tasks": 20},
    "frozenlake-unary": {"kind": "frozenlake", "test_tasks": 20, "feedback": "unary"},
    "sokoban": {"kind": "sokoban", "boxes": 2, "max_steps": 14, "test_tasks": 20},
    "hotpotqa": {"kind": "hotpotqa"},
    "chained": {"kind": "mulligan.testing.chained"},
    "duel": {"kind": "mulligan.testing.chained", "players": 2},
    "duel-silent": {"kind": "mulligan.testing.chained", "players": 2, "feedback": "silent"},
    "rigid": {"kind": "mulligan.testing.chained", "can_fork": False},
}
FORKING = [name for name in ENVIRONMENTS if name != "rigid"]
ACTIONS = [
    "```Up```",
    "```Down```",
    "```Left```",
    "```Right```",
    '<tool_call>{"name": "local_search", "arguments": {"query": "town river"}}</tool_call>',
    '<tool_call>{"name": "local_search", "arguments": {"query": "the painter", "top_k": 2}}</tool_call>',
    "\\boxed{yes}",
    "",
]
actions = st.lists(st.sampled_from(ACTIONS), max_size=6)


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses) -> ServiceProcess:
    return shared_services.start("env", environments=ENVIRONMENTS)


async def play(episode: RemoteEpisode, texts: list[str]) -> list[EpisodeStep]:
    """Until the episode is over or the texts are used up."""
    steps: list[EpisodeStep] = []
    for text in texts:
        if steps and steps[-1].done:
            break
        steps.append(await episode.step(text))
    return steps


@pytest.mark.parametrize("name", FORKING)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(number=st.integers(0, 9), past=actions, future=actions, other=actions)
def test_a_copy_goes_on_as_its_source_does(
    server: ServiceProcess, name: str, number: int, past: list[str], future: list[str], other: list[str]
) -> None:
    async def body() -> None:
        client = EnvClient(Endpoint(server.address))
        tasks = await client.list_tasks(name, Split.TRAIN, number + 1)
        source = await client.start(
            name, tasks[0 if name not in ("frozenlake", "sokoban") else -1].task_id, uuid4().hex
        )
        played: list[EpisodeStep] = []
        for text in past:
            played.append(await source.step(text))
            if played[-1].done:
                await client.close()
                return
        copies = [await source.fork(uuid4().hex) for _ in range(2)]
        last = played[-1] if played else source
        assert all((copy.observation, copy.player) == (last.observation, last.player) for copy in copies)
        aside = await play(copies[0], other)
        expected = await play(source, future)
        assert await play(copies[1], future) == expected
        again = await asyncio.gather(*(client.step(copies[0].episode_id, n, text) for n, text in enumerate(past)))
        assert again == played
        shared = [ours == theirs for ours, theirs in zip(future, other, strict=False)]
        alike = shared.index(False) if False in shared else len(shared)
        assert aside[:alike] == expected[:alike]
        await client.close()

    asyncio.run(body())


async def test_what_cannot_be_forked_says_so(server: ServiceProcess) -> None:
    client = EnvClient(Endpoint(server.address))
    assert {info.name: info.can_fork for info in await client.list_environments()} == {
        name: name in FORKING for name in ENVIRONMENTS
    }
    episode = await client.start("rigid", "plain", uuid4().hex)
    with pytest.raises(DomainError, match="'rigid' cannot be forked") as caught:
        await episode.fork(uuid4().hex)
    assert caught.value.reason is Reason.FORK_UNSUPPORTED
    async with grpc.aio.insecure_channel(server.address) as channel:
        request = pb.ForkEpisodeRequest(episode_id=episode.episode_id, new_episode_id=uuid4().hex)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pb_grpc.EnvServiceStub(channel).ForkEpisode(request)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await client.close()


async def test_a_tree_grows_while_other_episodes_play(server: ServiceProcess) -> None:
    """Each leaf's observation proves its whole path."""
    client = EnvClient(Endpoint(server.address))
    stop = asyncio.Event()

    async def neighbour() -> int:
        count = 0
        while not stop.is_set():
            episode = await client.start("chained", "plain", uuid4().hex)
            chain = Chain(episode.observation)
            for number in range(8):
                assert (await episode.step(f"{number}")).observation == chain.after(f"{number}")
            count += 1
        return count

    async def grow(episode: RemoteEpisode, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
        if len(path) == 5:
            return [(path, episode.observation)]
        found = []
        copies = [episode, *await asyncio.gather(*(episode.fork(uuid4().hex) for _ in range(2)))]
        for number, copy in enumerate(copies):
            action = f"{number}"
            shown = (await copy.step(action)).observation
            copy.observation = shown
            found.append(grow(copy, (*path, action)))
        return [leaf for leaves in await asyncio.gather(*found) for leaf in leaves]

    neighbours = [asyncio.create_task(neighbour()) for _ in range(8)]
    root = await client.start("chained", "plain", uuid4().hex)
    nonce = root.observation
    leaves = await grow(root, ())
    stop.set()
    assert all(await asyncio.gather(*neighbours))
    assert len(leaves) == len(set(leaves)) == 3**5
    for path, shown in leaves:
        chain = Chain(nonce)
        assert [chain.after(action) for action in path][-1] == shown
    await client.close()


async def test_two_players_take_turns(server: ServiceProcess) -> None:
    client = EnvClient(Endpoint(server.address))
    for name in ("duel", "duel-silent"):
        assert (await client.describe(name)).player_count == 2
        episode = await client.start(name, "plain", uuid4().hex)
        turns = [episode.player]
        for _ in range(4):
            step = await episode.step("x")
            assert step.rewards == (0.0, 1.0) and step.player == episode.player
            turns.append(step.player)
        assert turns == [1, 1, 0, 1, 0]
    with pytest.raises(DomainError, match="player is 7, not one of 2 from 0") as caught:
        await client.start("duel", "bad-player", uuid4().hex)
    assert caught.value.reason is Reason.ENVIRONMENT_FAILED
    await client.close()
