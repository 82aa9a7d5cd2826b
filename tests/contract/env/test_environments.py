"""What any environment must do, over gRPC against a real process: every check of `mulligan conformance env`, and what a
client in Python sees besides. A new environment is added to ENVIRONMENTS, and its kind to ACTIONS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import EnvironmentInfo, EpisodeStep, Outcome, Split
from mulligan.conformance.env import ENVIRONMENT, SERVER, episodes, forks, play, rules, steps
from mulligan.conformance.env.game import EnvOptions, Game
from mulligan.conformance.env.run import METHODS, target
from mulligan.conformance.report import Check, Verdict, judge
from mulligan.conformance.target import CheckSession, Target
from mulligan.env.client import EnvClient
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.testing.processes import ServiceProcess, ServiceProcesses

# Name → its table in the server's configuration, with few enough tasks that the suite can list them.
ENVIRONMENTS: dict[str, dict[str, object]] = {
    "frozenlake": {"kind": "frozenlake", "train_tasks": 250, "test_tasks": 20},
    "frozenlake-3x3": {"kind": "frozenlake", "size_min": 3, "size_max": 3, "prompts": "compact", "train_tasks": 120},
    "sokoban": {"kind": "sokoban", "train_tasks": 250, "test_tasks": 20},
    "sokoban-two-boxes": {"kind": "sokoban", "boxes": 2, "max_steps": 14, "train_tasks": 120, "test_tasks": 20},
    "hotpotqa": {"kind": "hotpotqa", "train_tasks": 250},
    "hotpotqa-unary": {"kind": "hotpotqa", "feedback": "unary", "tools": "prompt", "train_tasks": 120},
    "frozenlake-silent": {"kind": "frozenlake", "feedback": "silent", "train_tasks": 120, "test_tasks": 20},
    "gymnasium": {
        "kind": "gymnasium",
        "id": "FrozenLake-v1",
        "max_reward": 1,
        "max_steps": 12,
        "actions": ["Left", "Down", "Right", "Up"],
        "train_tasks": 120,
    },
    "questions": {"kind": "questions"},
    "rules": {"kind": "constrained_writing", "further": 2, "partial": True, "train_tasks": 120, "test_tasks": 20},
    "lakes-without-a-goal": {
        "kind": "unanswerable",
        "wrapped": {"kind": "frozenlake", "train_tasks": 250, "test_tasks": 20},
        "refusal": "```nothing```",
    },
    "reasoning-gym": {"kind": "reasoning_gym", "datasets": ["chain_sum", "countdown", "ab"], "train_tasks": 40},
    "tic-tac-toe": {"kind": "textarena", "id": "TicTacToe-v0", "players": 2, "max_steps": 12, "train_tasks": 120},
    "three-player-tic-tac-toe": {
        "kind": "textarena",
        "id": "ThreePlayerTicTacToe-v0",
        "players": 3,
        "max_steps": 20,
        "train_tasks": 120,
    },
    "tower-of-hanoi": {"kind": "textarena", "id": "TowerOfHanoi-v0", "players": 1, "max_steps": 12, "train_tasks": 120},
}
# Kind → actions that mean something in it; the last ones may end an episode.
MOVES = ("```Up```", "```down```", "I go ```Left``` now", "``` RIGHT\n```")
SEARCHES = (
    '<tool_call>{"name": "local_search", "arguments": {"query": "town river"}}</tool_call>',
    '<tool_call>{"name": "local_search", "arguments": {"query": "founder", "top_k": 2}}</tool_call>',
    '<function_calls>local_search(query="painter")</function_calls>',
    "It is \\boxed{yes}",
)
ANSWERS = ("<answer>12</answer>", "It is \\boxed{A# #B}", "<answer>3 + 4 * 5</answer>", "I say\n7")
ACTIONS: dict[str, Sequence[str]] = {
    "frozenlake": MOVES,
    "sokoban": MOVES,
    "hotpotqa": SEARCHES,
    "gymnasium": (*MOVES, "2", "```1```", "north"),
    "questions": (*ANSWERS, "\\boxed{B}", "B. bat", "The answer is stones."),
    "constrained_writing": ("A dog sleeps.", "Is it a dog?", "the dogs, all of them, sleep", "Dog."),
    "unanswerable": (*MOVES, "I see no goal: ```nothing```"),
    "reasoning_gym": ANSWERS,
    "textarena": ("[0]", "[A C]", "[1 2]", "[4]", "I play [8]", "[3 4]", "[A B]"),
}

HOSTILE = ["```", "Up", "\n", "\x00", "{trace}", "√", "\U0001f9ca", "\u202e", "<tool_call>", "{", "\\boxed{"]
hostile_texts = st.one_of(
    st.text(max_size=200),
    st.sampled_from([*MOVES, *SEARCHES]),
    st.lists(st.sampled_from(HOSTILE), max_size=40).map("".join),
    st.text(max_size=60).map(lambda text: f"<tool_call>{text}</tool_call>"),
)
# What needs another server: `tests/contract/conformance/test_suites.py` has one each.
ELSEWHERE = (episodes.unavailable, episodes.lease, play.failure)
CHECKS = [check for check in ENVIRONMENT.checks if check.body not in ELSEWHERE]


def actions_of(name: str) -> Sequence[str]:
    return ACTIONS[str(ENVIRONMENTS[name]["kind"])]


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses) -> ServiceProcess:
    return shared_services.start("env", environments=ENVIRONMENTS)


@pytest.fixture
async def client(server: ServiceProcess) -> AsyncIterator[EnvClient]:
    client = EnvClient(Endpoint(server.address))
    yield client
    await client.close()


@pytest.fixture(params=list(ENVIRONMENTS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def connected(server: ServiceProcess) -> AsyncIterator[Target]:
    connected = target(server.address)
    yield connected
    await connected.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def games(connected: Target) -> dict[str, Game]:
    listed = (await connected.connect(*METHODS)).environments
    return {info.name: Game(CheckSession(connected), info, EnvOptions(known=actions_of(info.name))) for info in listed}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("check", SERVER.checks, ids=lambda check: f"{check.call}: {check.title}")
async def test_the_server_keeps_each_promise(connected: Target, check: Check[CheckSession]) -> None:
    result = await judge(check, CheckSession(connected))
    if "token" in check.title:
        assert result.verdict is Verdict.NOT_APPLICABLE  # conformance/test_suites.py has a server with one
    else:
        assert result.verdict is Verdict.PASSED, result


def without(info: pb.EnvironmentInfo) -> list[Any]:
    """The checks that an environment which says this of itself has no part in."""
    absent: list[Any] = [forks.unsupported] if info.can_fork else []
    if not info.can_fork:
        absent += [check.body for check in forks.suite.checks if check.body is not forks.unsupported]
    if not info.deterministic:
        absent += [episodes.second_attempt, episodes.side_by_side, steps.played_once, steps.concurrent]
        absent += [steps.batch_plays, play.deterministic, forks.exact, forks.independent]
    if info.max_steps == 1:
        absent += [steps.repeated_later, steps.skipped_later]
        absent += [forks.shares_the_past, forks.independent, forks.outlives, forks.repeated, forks.at_the_right_place]
    return absent


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.call}: {check.title}")
async def test_each_environment_keeps_each_promise(games: dict[str, Game], name: str, check: Check[Game]) -> None:
    game = games[name]
    result = await judge(check, game, name)
    expected = Verdict.NOT_APPLICABLE if check.body in without(game.info) else Verdict.PASSED
    assert result.verdict is expected, result


async def playing(client: EnvClient, name: str, task_id: str, actions: list[str]) -> tuple[str, list[EpisodeStep]]:
    """The first observation, and the steps until the episode or the actions end."""
    episode = await client.start(name, task_id, str(uuid4()))
    taken: list[EpisodeStep] = []
    for action in actions:
        taken.append(await episode.step(action))
        if taken[-1].done:
            break
    await episode.end()
    return episode.observation, taken


async def test_it_describes_itself(client: EnvClient, name: str) -> None:
    info = await client.describe(name)
    assert info.name == name and info.description and not info.unavailable
    assert info.task_counts[Split.TRAIN] >= 1
    assert all(tool.description for tool in info.tools)
    with pytest.raises(DomainError, match="'no-such-task'"):
        await client.start(name, "no-such-task", str(uuid4()))


async def test_its_tasks_come_in_order_through_the_client(client: EnvClient, name: str) -> None:
    everything = await client.list_tasks(name, Split.TRAIN, 0)
    assert len(everything) == (await client.describe(name)).task_counts[Split.TRAIN]
    assert await client.list_tasks(name, Split.TRAIN, 7) == everything[:7]


async def test_a_tool_answers_as_a_tool_unless_the_prompt_tells_of_it(client: EnvClient) -> None:
    tools = {info.name: info.tools for info in await client.list_environments() if info.tools}
    assert [tool.name for tool in tools.pop("hotpotqa")] == ["local_search"] and not tools
    for name, speaker in (("hotpotqa", "local_search"), ("hotpotqa-unary", "")):
        (task,) = await client.list_tasks(name, Split.TEST, 1)
        _, taken = await playing(client, name, task.task_id, [SEARCHES[0], "I give up."])
        assert [step.tool for step in taken] == [speaker, ""]
        assert taken[0].observation.startswith("[Document 1]")
    assert taken[1].feedback == "That was wrong, try again."


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(played=st.lists(st.lists(hostile_texts, min_size=1, max_size=14), min_size=1, max_size=12))
def test_no_action_breaks_it(server: ServiceProcess, name: str, played: list[list[str]]) -> None:
    """Episodes side by side, a task each: some thousand actions over all examples and environments."""

    async def body() -> None:
        connected = target(server.address)
        listed = (await connected.connect(*METHODS)).environments
        (info,) = (info for info in listed if info.name == name)
        game = Game(CheckSession(connected), info, EnvOptions())
        tasks = [task.task_id for task in await game.tasks(len(played))]
        plays = [(tasks[n % len(tasks)], actions) for n, actions in enumerate(played)]
        for episode in await game.side_by_side(plays):
            wrong = [wrong for rule in rules.ALL for wrong in rule(info, episode)]
            assert not wrong, (episode.task_id, episode.actions)
        await connected.close()

    asyncio.run(body())


@pytest.mark.parametrize("filling", ["x", "`", "```Up", "√"])
async def test_an_action_of_four_megabytes_is_the_longest(client: EnvClient, name: str, filling: str) -> None:
    (task,) = await client.list_tasks(name, Split.TRAIN, 1)
    limit = 4 * 2**20
    _, taken = await playing(client, name, task.task_id, [filling * (limit // len(filling.encode()))])
    assert taken[0].outcome in (None, Outcome.COMPLETED, Outcome.TRUNCATED)
    with pytest.raises(DomainError) as caught:
        await playing(client, name, task.task_id, [filling * (limit // len(filling.encode()) + 1)])
    assert caught.value.reason is Reason.INVALID_FIELD
    assert "action" in caught.value.metadata["field"]


async def test_text_that_cannot_travel_is_refused_by_name(client: EnvClient, name: str) -> None:
    (task,) = await client.list_tasks(name, Split.TRAIN, 1)
    with pytest.raises(DomainError, match="action: expected") as caught:
        await playing(client, name, task.task_id, ["\ud800"])
    assert caught.value.reason is Reason.INVALID_FIELD


async def test_many_episodes_at_once_do_not_mix(client: EnvClient, name: str) -> None:
    """More of them than the conformance suite plays."""
    info: EnvironmentInfo = await client.describe(name)
    tasks = (await client.list_tasks(name, Split.TRAIN, 100)) * 2
    kinds = actions_of(name)
    actions = [kinds[(n * n + n // 3) % len(kinds)] for n in range(info.max_steps)]
    alone = {task.task_id: await playing(client, name, task.task_id, actions) for task in tasks[:10]}
    together = await asyncio.gather(*(playing(client, name, task.task_id, actions) for task in tasks))
    for task, played in zip(tasks, together, strict=True):
        if info.deterministic:
            assert played == alone.get(task.task_id, played)
        assert all(step.action and step.error == "" for step in played[1])
