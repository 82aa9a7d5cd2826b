"""Tools of an environment as the policy meets them: shown once, and answering in their own role."""

from __future__ import annotations

from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Sample
from mulligan.common.inference import Continuation, Feature, Message, Role, SamplingParams, Tool
from mulligan.common.types import Outcome
from mulligan.trainer.harness import Harness
from mulligan.trainer.preflight import check_environment
from mulligan.trainer.sampling import NamedPolicy
from tests.support.fakes import FakeEnvironment, FakePolicy
from tests.support.playing import play_episode

SEARCH = Tool("search", "Finds text.", '{"type": "object", "properties": {"query": {"type": "string"}}}')


async def harness(policy: FakePolicy, **changes: Any) -> Harness:
    plain: dict[str, Any] = {"turns": 3, "tools": (SEARCH,)}
    environment = FakeEnvironment({"t0": "go"}, **(plain | changes))
    named = await NamedPolicy.open(policy, "")
    return Harness(environment, named, await environment.describe("fake"), named.info, "x", 0)


def says_go(**changes: Any) -> FakePolicy:
    return FakePolicy(lambda system, last, sampling: "go", **changes)


async def test_tools_are_shown_once_and_answer_in_their_own_role() -> None:
    policy = says_go()
    attempt = await play_episode(await harness(policy), "a", "t0", "solve", SamplingParams())
    assert attempt.outcome is Outcome.COMPLETED
    assert [options.tools for options in policy.options] == [(SEARCH,), (), ()], "the tokens so far show them"
    (first, _), *later = policy.calls
    assert first == (Message(Role.SYSTEM, "solve"), Message(Role.USER, "board t0"))
    for prompt, _ in later:
        assert isinstance(prompt, Continuation)
        assert prompt.messages == (Message(Role.TOOL, "after go", name="search"),)
    assert [turn.tool for turn in attempt.turns] == ["", "search", "search"]


async def test_where_turns_are_rendered_anew_each_shows_the_tools() -> None:
    policy = says_go(rewrites_history=True)
    made = await harness(policy)
    attempt = await play_episode(made, "a", "t0", "solve", SamplingParams())
    assert [options.tools for options in policy.options] == [(SEARCH,)] * 3
    last, _ = policy.calls[-1]
    assert isinstance(last, tuple) and [message.role for message in last[1:]] == [
        Role.USER,
        Role.ASSISTANT,
        Role.TOOL,
        Role.ASSISTANT,
        Role.TOOL,
    ]
    # A distilled target stands under the prompts of a first attempt, which has the same tools and answers of them.
    asked: list[Any] = []
    tokenize = made.policy.tokenize

    async def recording(prompt: Any, options: Any) -> tuple[int, ...]:
        asked.append((prompt, options))
        return await tokenize(prompt, options)

    object.__setattr__(made, "policy", type("Recording", (), {"tokenize": staticmethod(recording)}))
    await made.prompts_of(attempt, "solve", attempt)
    assert [prompt for prompt, _ in asked] == [prompt for prompt, _ in policy.calls]
    assert all(options.tools == (SEARCH,) for _, options in asked)


async def test_a_reflector_is_shown_no_tools() -> None:
    policy = says_go()
    made = await harness(policy)
    attempt = await play_episode(made, "a", "t0", "solve", SamplingParams())
    blank = Sample("r", "reflection", Outcome.COMPLETED, (), 1.0, system="reflect", parent_id=attempt.sample_id)
    await made.write(blank, "what happened?", SamplingParams(), 0)
    assert policy.options[-1].tools == ()


@pytest.mark.parametrize(
    ("environment", "features", "words"),
    [
        ({"unavailable": "needs the extra 'ice'"}, frozenset(Feature), "needs the extra 'ice'"),
        ({"player_count": 2}, frozenset(Feature), "a game of 2 players"),
        ({"tools": (SEARCH,)}, frozenset(Feature) - {Feature.TOOLS}, 'tools = "prompt"'),
    ],
)
async def test_what_a_policy_cannot_play_is_refused_before_it_begins(
    environment: dict[str, Any], features: frozenset[Feature], words: str
) -> None:
    info = await FakeEnvironment({"t0": "go"}, **environment).describe("fake")
    policy = await says_go(features=features).info()
    with pytest.raises(DomainError, match=words) as caught:
        check_environment(info, policy)
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata == {"field": "environment"}
    check_environment(await FakeEnvironment({"t0": "go"}, tools=(SEARCH,)).describe("fake"), await says_go().info())
