"""The published tasks as an agent meets them: attempts and reflections of the trainer's harness, over gRPC."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.experience import Sample
from mulligan.common.inference import Message, SamplingParams
from mulligan.common.types import Outcome, Split
from mulligan.env.client import EnvClient
from mulligan.env.envs.hotpotqa import world as hotpotqa_world
from mulligan.env.envs.sokoban.boards import solve
from mulligan.env.envs.sokoban.environment import Sokoban
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.harness import Harness
from mulligan.trainer.texts import fill, guided_by, reflection_in, reflection_request, trace_of
from tests.support.fakes import FakePolicy
from tests.support.llama_model import TOOLS_TEMPLATE, write_llama_model
from tests.support.playing import play_episode
from tests.support.policy import serving

SAMPLING = SamplingParams()
Answer = Callable[[str, str, SamplingParams], str]


@pytest.fixture
async def client(shared_services: ServiceProcesses) -> AsyncIterator[EnvClient]:
    client = EnvClient(Endpoint(shared_services.start("env").address))
    yield client
    await client.close()


async def harness(client: EnvClient, environment: str, answer: Answer) -> Harness:
    policy = FakePolicy(answer)
    return Harness(client, policy, await client.describe(environment), await policy.info(), "i0", 0)


async def attempt(made: Harness, task_id: str) -> Sample:
    return await play_episode(made, f"a-{task_id}", task_id, made.info.prompts.solver, SAMPLING)


def search(query: str) -> str:
    return f"<tool_call>{json.dumps({'name': 'local_search', 'arguments': {'query': query}})}</tool_call>"


async def test_whoever_knows_sokoban_solves_its_tasks(client: EnvClient) -> None:
    sokoban = Sokoban()
    for task in await client.list_tasks("sokoban", Split.TEST, 5):
        moves = iter(solve(sokoban.board(task.task_id), 8) or ())
        played = await attempt(
            await harness(client, "sokoban", lambda *_, moves=moves: f"```{next(moves)}```"), task.task_id
        )
        assert (played.outcome, played.reward) == (Outcome.COMPLETED, 1.0)
        assert len(played.turns) == task.difficulty


async def test_whoever_searches_hotpotqa_can_answer_it(client: EnvClient) -> None:
    for record in hotpotqa_world.data_sets()[1][:5]:
        turns = [search(title) for title, _ in record["supporting_facts"]] + [f"\\boxed{{{record['answer']}}}"]
        said = iter(turns)
        made = await harness(client, "hotpotqa", lambda *_, said=said: next(said))
        played = await attempt(made, f"test/{record['_id']}")
        assert (played.outcome, played.reward) == (Outcome.COMPLETED, 1.0)
        assert played.turns[0].observation == record["question"]


async def test_a_model_searches_hotpotqa_through_its_chat_template(client: EnvClient, tmp_path: Path) -> None:
    """The tool is in the first prompt, its answers come in the template's role for them, and no token is rendered
    twice. What the model says is forced on it: it has random weights."""
    info = await client.describe("hotpotqa")
    (task,) = await client.list_tasks("hotpotqa", Split.TEST, 1)
    forced = SamplingParams(regex=re.escape(search("river")), max_tokens=200)
    async with serving(write_llama_model(tmp_path / "llama", template=TOOLS_TEMPLATE)) as policy:
        made = Harness(client, policy.client, info, await policy.client.info(), "i0", 0)
        played = await play_episode(made, "a", task.task_id, info.prompts.solver, forced)
        text = policy.backend.decode(played.sequences[0].token_ids)
    assert played.error == "" and len(played.turns) > 1 and len(played.sequences) == 1
    assert [turn.tool for turn in played.turns] == ["", *["local_search"] * (len(played.turns) - 1)]
    assert text.count('"name": "local_search", "description"') == 1
    assert text.count("ipython\n\n[Document 1]") == len(played.turns) - 1


@pytest.mark.parametrize(
    ("environment", "answer", "seen", "told"),
    [
        ("sokoban", "```Up```", "\t", "The step limit was reached"),
        ("hotpotqa", search("{trace} river"), "[Document 1]", "The turns were used up."),
        ("hotpotqa", "{feedback} \\boxed{nothing}", "Agent: answer: nothing", "Incorrect. Reward 0.00."),
    ],
)
async def test_a_failure_is_reflected_on_and_tried_again(
    client: EnvClient, environment: str, answer: str, seen: str, told: str
) -> None:
    """Every placeholder is filled, and what the agent wrote fills none."""
    requests: list[str] = []

    def say(system: str, last: str, sampling: SamplingParams) -> str:
        if system == made.info.prompts.reflection_system:
            requests.append(last)
            return "<prompt>Do better.</prompt>"
        return answer

    made = await harness(client, environment, say)
    (task,) = await client.list_tasks(environment, Split.TRAIN, 1)
    first = await attempt(made, task.task_id)
    assert first.reward == 0.0 and first.feedback.startswith(told)
    prompts = made.info.prompts
    blank = Sample("r", "reflection", Outcome.COMPLETED, (), 1.0, system=prompts.reflection_system)
    asked = reflection_request(first, prompts, [])
    reflection = await made.write(blank, asked, SAMPLING, 0, read=lambda said: reflection_in(said, prompts))
    assert reflection.text == "Do better."
    (request,) = requests
    assert seen in request and told in request and made.info.prompts.memory_empty in request
    retry = fill(made.info.prompts.retry, trace=trace_of(first, made.info.prompts), feedback=first.feedback)
    for text in (request, retry):
        left = set(re.findall(r"\{(trace|feedback|reward|memory|observation|action)\}", text))
        assert left <= ({"trace"} if "{trace}" in answer else set())
    second = await play_episode(made, "b", task.task_id, guided_by(reflection.text, prompts), SAMPLING)
    assert second.turns[0].observation == first.turns[0].observation
    prompt, _ = made.policy.calls[-len(second.turns)]  # type: ignore[attr-defined]
    assert prompt[0] == Message(prompt[0].role, "Do better.\n" + made.info.prompts.action_reminder)
