"""What any environment must do, over gRPC against a real process. A new environment is added to ENVIRONMENTS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from uuid import uuid4

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc

from services.common.channel import Endpoint
from services.common.errors import DomainError, Reason
from services.common.types import EnvironmentInfo, EpisodeStep, Outcome, Split
from services.env.client import EnvClient
from tests.support.processes import ServiceProcess, Services

# Name → its table in the server's configuration, with few enough tasks that the suite can list them.
ENVIRONMENTS: dict[str, dict[str, object]] = {
    "frozenlake": {"kind": "frozenlake", "train_tasks": 250, "test_tasks": 20},
    "frozenlake-3x3": {"kind": "frozenlake", "size_min": 3, "size_max": 3, "prompts": "compact", "train_tasks": 120},
    "sokoban": {"kind": "sokoban", "train_tasks": 250, "test_tasks": 20},
    "sokoban-two-boxes": {"kind": "sokoban", "boxes": 2, "max_steps": 14, "train_tasks": 120, "test_tasks": 20},
    "hotpotqa": {"kind": "hotpotqa", "train_tasks": 250},
    "hotpotqa-unary": {"kind": "hotpotqa", "feedback": "unary", "tools": "prompt", "train_tasks": 120},
    "frozenlake-silent": {"kind": "frozenlake", "feedback": "silent", "train_tasks": 120, "test_tasks": 20},
}
# Actions that mean something in one environment or another.
MOVES = ["```Up```", "```down```", "I go ```Left``` now", "``` RIGHT\n```"]
SEARCHES = [
    '<tool_call>{"name": "local_search", "arguments": {"query": "town river"}}</tool_call>',
    '<tool_call>{"name": "local_search", "arguments": {"query": "founder", "top_k": 2}}</tool_call>',
    '<function_calls>local_search(query="painter")</function_calls>',
    "It is \\boxed{yes}",
]
ACTIONS = MOVES + SEARCHES
PLACEHOLDERS = {
    "solver": "",
    "action_reminder": "",
    "reflection_system": "",
    "reflection": "{trace} {feedback}",
    "trace_turn": "{observation} {action}",
    "retry": "{trace} {feedback}",
    "try_again": "",
}
HOSTILE = ["```", "Up", "\n", "\x00", "{trace}", "√", "\U0001f9ca", "\u202e", "<tool_call>", "{", "\\boxed{"]
hostile_texts = st.one_of(
    st.text(max_size=200),
    st.sampled_from(ACTIONS),
    st.lists(st.sampled_from(HOSTILE), max_size=40).map("".join),
    st.text(max_size=60).map(lambda text: f"<tool_call>{text}</tool_call>"),
)


@pytest.fixture(scope="module")
def server(shared_services: Services) -> ServiceProcess:
    return shared_services.start("env", environments=ENVIRONMENTS)


@pytest.fixture
async def client(server: ServiceProcess) -> AsyncIterator[EnvClient]:
    client = EnvClient(Endpoint(server.address))
    yield client
    await client.close()


@pytest.fixture(params=list(ENVIRONMENTS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def play(client: EnvClient, name: str, task_id: str, actions: list[str]) -> tuple[str, list[EpisodeStep]]:
    """The first observation, and the steps until the episode or the actions end."""
    episode = await client.start(name, task_id, str(uuid4()))
    steps: list[EpisodeStep] = []
    for action in actions:
        steps.append(await episode.step(action))
        if steps[-1].done:
            break
    await episode.end()
    return episode.observation, steps


def actions_for(name: str, count: int) -> list[str]:
    """Searches and an answer where there is something to search, moves elsewhere; not each time the same."""
    kinds = SEARCHES if name.startswith("hotpotqa") else MOVES
    return [kinds[(n * n + n // 3) % len(kinds)] for n in range(count)]


def check(info: EnvironmentInfo, steps: list[EpisodeStep]) -> None:
    """What holds for the steps of every episode."""
    assert len(steps) <= info.max_steps
    for step in steps[:-1]:
        assert (step.done, step.outcome, step.feedback, step.error) == (False, None, "", "")
    assert {step.tool for step in steps} <= {tool.name for tool in info.tools} | {""}
    assert all(step.reward is not None and step.observation and step.action for step in steps)
    assert sum(step.reward or 0.0 for step in steps) <= info.max_reward
    last = steps[-1]
    assert last.done == (last.outcome in (Outcome.COMPLETED, Outcome.TRUNCATED))
    assert last.done or not last.feedback
    assert last.done or len(steps) < info.max_steps


async def test_it_describes_itself(client: EnvClient, name: str) -> None:
    info = await client.describe(name)
    assert info.name == name
    assert info.description
    assert info.max_steps >= 1
    assert info.task_counts[Split.TRAIN] >= 1
    for prompt, names in PLACEHOLDERS.items():
        text = getattr(info.prompts, prompt)
        assert text
        assert all(placeholder in text for placeholder in names.split()), prompt
    assert not info.unavailable
    for tool in info.tools:
        schema = json.loads(tool.parameters)
        assert tool.name and tool.description
        assert schema["type"] == "object" and set(schema.get("required", [])) <= set(schema["properties"])


async def test_its_tasks_are_listed_whole_page_by_page(server: ServiceProcess, client: EnvClient, name: str) -> None:
    info = await client.describe(name)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.EnvServiceStub(channel)
        found: dict[int, list[str]] = {}
        for split, count in ((pb.SPLIT_TRAIN, Split.TRAIN), (pb.SPLIT_TEST, Split.TEST)):
            tasks: list[pb.TaskInfo] = []
            token = "start"
            while token:
                request = pb.ListTasksRequest(
                    environment=name, split=split, page_size=50, page_token="" if token == "start" else token
                )
                page = await stub.ListTasks(request)
                assert len(page.tasks) <= 50
                tasks += page.tasks
                token = page.next_page_token
            assert all(task.split == split for task in tasks)
            found[split] = [task.task_id for task in tasks]
            assert len(found[split]) == info.task_counts[count]
    everything = found[pb.SPLIT_TRAIN] + found[pb.SPLIT_TEST]
    assert len(set(everything)) == len(everything)
    assert [task.task_id for task in await client.list_tasks(name, Split.TRAIN, 0)] == found[pb.SPLIT_TRAIN]
    assert [task.task_id for task in await client.list_tasks(name, Split.TEST, 7)] == found[pb.SPLIT_TEST][:7]


@pytest.mark.parametrize("token", ["nonsense", "é", "bnVsbA==", "WzEsIjEiXQ==", "WzFlOTksIiJd"])
async def test_a_bad_page_token_is_refused(server: ServiceProcess, name: str, token: str) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        request = pb.ListTasksRequest(environment=name, split=pb.SPLIT_TRAIN, page_token=token)
        with pytest.raises(grpc.aio.AioRpcError, match="page_token") as caught:
            await pb_grpc.EnvServiceStub(channel).ListTasks(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unknown_task_is_named(client: EnvClient, name: str) -> None:
    for task_id in ("no-such-task", "train/99999", "../etc/passwd", "\x00", "test/-0001"):
        with pytest.raises(DomainError) as caught:
            await client.start(name, task_id, str(uuid4()))
        assert caught.value.reason is Reason.UNKNOWN_TASK
        assert repr(task_id) in caught.value.message


async def test_the_same_actions_lead_to_the_same_answers(client: EnvClient, name: str) -> None:
    info = await client.describe(name)
    tasks = await client.list_tasks(name, Split.TRAIN, 20) + await client.list_tasks(name, Split.TEST, 5)
    actions = actions_for(name, info.max_steps)
    first = await asyncio.gather(*(play(client, name, task.task_id, actions) for task in tasks))
    again = await asyncio.gather(*(play(client, name, task.task_id, actions) for task in tasks))
    for _, steps in first:
        check(info, steps)
    assert first == again or not info.deterministic


async def test_a_tool_answers_as_a_tool_unless_the_prompt_tells_of_it(client: EnvClient) -> None:
    tools = {info.name: info.tools for info in await client.list_environments() if info.tools}
    assert [tool.name for tool in tools.pop("hotpotqa")] == ["local_search"] and not tools
    for name, speaker in (("hotpotqa", "local_search"), ("hotpotqa-unary", "")):
        (task,) = await client.list_tasks(name, Split.TEST, 1)
        _, steps = await play(client, name, task.task_id, [SEARCHES[0], "I give up."])
        assert [step.tool for step in steps] == [speaker, ""]
        assert steps[0].observation.startswith("[Document 1]")
    assert steps[1].feedback == "That was wrong, try again."


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(played=st.lists(st.lists(hostile_texts, min_size=1, max_size=14), min_size=1, max_size=12))
def test_no_action_breaks_it(server: ServiceProcess, name: str, played: list[list[str]]) -> None:
    """Episodes side by side, a task each: some thousand actions over all examples and environments."""

    async def body() -> None:
        client = EnvClient(Endpoint(server.address))
        info = await client.describe(name)
        tasks = await client.list_tasks(name, Split.TRAIN, len(played))
        pairs = zip(tasks, played, strict=True)
        for _, steps in await asyncio.gather(*(play(client, name, task.task_id, actions) for task, actions in pairs)):
            check(info, steps)
        await client.close()

    asyncio.run(body())


@pytest.mark.parametrize("filling", ["x", "`", "```Up", "√"])
async def test_a_very_long_action_is_played_or_precisely_refused(client: EnvClient, name: str, filling: str) -> None:
    (task,) = await client.list_tasks(name, Split.TRAIN, 1)
    limit = 4 * 2**20
    long = filling * (limit // 4 // len(filling.encode()))
    _, steps = await play(client, name, task.task_id, [long])
    assert steps[0].outcome in (None, Outcome.COMPLETED, Outcome.TRUNCATED)
    with pytest.raises(DomainError) as caught:
        await play(client, name, task.task_id, [filling * (limit // len(filling.encode()) + 1)])
    assert caught.value.reason is Reason.INVALID_FIELD
    assert "action" in caught.value.metadata["field"]


async def test_text_that_cannot_travel_is_refused_by_name(client: EnvClient, name: str) -> None:
    (task,) = await client.list_tasks(name, Split.TRAIN, 1)
    with pytest.raises(DomainError, match="action: expected") as caught:
        await play(client, name, task.task_id, ["\ud800"])
    assert caught.value.reason is Reason.INVALID_FIELD


async def test_many_episodes_at_once_do_not_mix(client: EnvClient, name: str) -> None:
    info = await client.describe(name)
    tasks = (await client.list_tasks(name, Split.TRAIN, 100)) * 2
    actions = actions_for(name, info.max_steps)
    alone = {task.task_id: await play(client, name, task.task_id, actions) for task in tasks[:10]}
    together = await asyncio.gather(*(play(client, name, task.task_id, actions) for task in tasks))
    for task, played in zip(tasks, together, strict=True):
        assert played == alone.get(task.task_id, played)
        check(info, played[1])
