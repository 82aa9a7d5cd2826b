"""Several policies in one service: each by its name, with a model and features of its own; and what is refused before
an engine sees it, option by option."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import Code, DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    Continuation,
    Feature,
    Message,
    Prompt,
    Role,
    SamplingParams,
    Tool,
    VersionSpan,
)
from mulligan.policy.client import PolicyClient
from mulligan.policy.config import PolicySettings
from mulligan.policy.policies import Policies
from mulligan.testing.weights import load, plain_log_probs
from tests.support.llama_model import write_llama_model
from tests.support.policy import Serving, serving
from tests.support.scripted import WORDS, Opened
from tests.support.tiny_model import write_tiny_model

ASKED = (Message(Role.SYSTEM, "play"), Message(Role.USER, "go"))
PLAIN = SamplingParams()
GO = Tool("go", "Goes", "{}")


async def refused(call: Awaitable[object], reason: Reason, **metadata: str) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await call
    assert caught.value.reason is reason, caught.value
    assert caught.value.metadata.items() >= metadata.items(), caught.value.metadata
    return caught.value


async def test_each_policy_is_asked_by_its_name(tmp_path: Path) -> None:
    qwen = write_tiny_model(tmp_path / "qwen")
    other = write_tiny_model(tmp_path / "other", seed=1)
    llama = write_llama_model(tmp_path / "llama")
    policies = {"reference": {"model": str(other), "frozen": True}, "reflector": {"model": str(llama)}}
    async with serving(qwen, policies=policies) as served:
        infos = {info.name: info for info in await served.client.policies()}
        assert list(infos) == ["actor", "reference", "reflector"]
        assert [info.model for info in infos.values()] == ["qwen", "other", "llama"]
        assert [info.frozen for info in infos.values()] == [False, True, False]
        assert infos["actor"].fingerprint == infos["reference"].fingerprint != infos["reflector"].fingerprint
        assert await served.client.info() == await served.client.info("actor") == infos["actor"]
        prompt = [5, 6, 7]
        for name, path in (("", qwen), ("actor", qwen), ("reference", other), ("reflector", llama)):
            options = CallOptions(policy=name)
            completion = await served.client.generate(prompt, SamplingParams(max_tokens=4), options)
            expected = plain_log_probs(load(path), [*prompt, *completion.token_ids])
            assert completion.log_probs == pytest.approx(expected[2:], abs=1e-4)
            scored = await served.client.score([prompt], 1.0, options)
            assert scored.log_probs[0] == pytest.approx(expected[:2], abs=1e-4)
        words = [await served.client.tokenize("system user", CallOptions(policy=name)) for name in infos]
        assert words[0] == words[1] != words[2]


async def test_a_name_that_nobody_has_is_told_those_that_there_are() -> None:
    async with serving("one", create=Opened().create, policies={"reference": {"model": "two"}}) as served:
        options = CallOptions(policy="nobody")
        for call in (
            served.client.info("nobody"),
            served.client.generate(ASKED, PLAIN, options),
            anext(served.client.stream(ASKED, PLAIN, 1, options)),
            served.client.score([[1, 2]], 1.0, options),
            served.client.tokenize("go", options),
            served.client.unload_model("nobody"),
        ):
            error = await refused(call, Reason.UNKNOWN_POLICY, policy="nobody")
            assert error.code is Code.NOT_FOUND and "actor, reference" in error.message


@pytest.mark.parametrize("size", [1, 2, 3, 4])
async def test_policies_are_listed_page_by_page(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulligan.policy.client._PAGE", size)
    policies = {name: {"model": "two"} for name in ("opponent", "reference")}
    async with serving("one", create=Opened().create, policies=policies) as served:
        assert [info.name for info in await served.client.policies()] == ["actor", *policies]


async def test_all_that_cannot_be_opened_is_told_and_nothing_stays_open() -> None:
    opened = Opened()
    policies = {"reference": {"model": "bad-1"}, "reflector": {"model": "bad-2"}, "opponent": {"model": "good"}}
    settings = PolicySettings(model="one", policies=policies)
    with pytest.raises(ExceptionGroup) as caught:
        await Policies.open(settings, opened.create)
    assert [str(error) for error in caught.value.exceptions] == ["reference: bad-1 is bad", "reflector: bad-2 is bad"]
    assert len(opened.backends) == 2 and all(backend.closed for backend in opened.backends)
    assert not any(folder.exists() for folder in opened.folders)


@pytest.fixture
async def scripted() -> AsyncIterator[Serving]:
    async with serving("one", create=Opened().create, adapters={"fast": "x", "slow": "y"}) as served:
        yield served


def generate(client: PolicyClient, prompt: Prompt = ASKED, options: CallOptions | None = None, **sampling: Any) -> Any:
    return client.generate(prompt, SamplingParams(**sampling), options or CallOptions())


def continued(token_ids: tuple[int, ...] = (1, 2)) -> Continuation:
    return Continuation(token_ids, True, ASKED[1:])


def options_of(name: str, client: PolicyClient) -> Any:
    """One call for each option that an engine may lack."""
    calls: dict[str, Callable[[], Any]] = {
        "text": lambda: client.tokenize("go"),
        "messages": lambda: client.tokenize(ASKED),
        "token_ids": lambda: generate(client, [1, 2]),
        "continuation": lambda: generate(client, continued()),
        "sequences": lambda: client.score([[1, 2]]),
        "temperature": lambda: client.score([[1, 2]], 0.5),
        "request": lambda: anext(client.stream(ASKED, PLAIN)),
        "sampling.top_k": lambda: generate(client, top_k=3),
        "sampling.seed": lambda: generate(client, seed=0),
        "sampling.stop_token_ids": lambda: generate(client, stop_token_ids=(3,)),
        "sampling.regex": lambda: generate(client, regex="a+"),
        "sampling.json_schema": lambda: generate(client, json_schema="{}"),
        "priority": lambda: generate(client, options=CallOptions(priority=-1)),
        "tools": lambda: generate(client, options=CallOptions(tools=(GO,))),
    }
    return calls[name]()


NEEDS = {
    "text": Feature.TOKEN_IDS,
    "messages": Feature.TOKEN_IDS,
    "token_ids": Feature.TOKEN_IDS,
    "continuation": Feature.TOKEN_IDS,
    "sequences": Feature.SCORE,
    "temperature": Feature.SCORE_TEMPERATURE,
    "request": Feature.STREAM,
    "sampling.top_k": Feature.TOP_K,
    "sampling.seed": Feature.SEED,
    "sampling.stop_token_ids": Feature.STOP_TOKEN_IDS,
    "sampling.regex": Feature.REGEX,
    "sampling.json_schema": Feature.JSON_SCHEMA,
    "priority": Feature.PRIORITY,
    "tools": Feature.TOOLS,
}


@pytest.mark.parametrize("feature", list(Feature))
async def test_an_option_without_its_feature_is_refused_and_no_other(feature: Feature) -> None:
    opened = Opened(features=frozenset(Feature) - {feature})
    async with serving("one", create=opened.create) as served:
        for field, needed in NEEDS.items():
            if needed is feature:
                call = options_of(field, served.client)
                error = await refused(call, Reason.UNSUPPORTED_OPTION, field=field, feature=feature)
                assert error.code is Code.INVALID_ARGUMENT
                assert served.backend.asks == []
            elif (field, feature) != ("temperature", Feature.SCORE):
                await options_of(field, served.client)
                served.backend.asks.clear()


async def test_an_engine_without_token_ids_gets_the_messages() -> None:
    opened = Opened(features=frozenset(Feature) - {Feature.TOKEN_IDS}, vocabulary_size=0, context_length=0)
    async with serving("one", create=opened.create) as served:
        completion = await served.client.generate(ASKED, PLAIN, CallOptions(tools=(GO,), session_id="s", priority=2))
        assert completion.text == "".join(WORDS)
        assert (completion.prompt_token_ids, completion.token_ids) == ((), ())
        assert completion.policy_versions == (VersionSpan(0, 1),) * 4
        parts = [part async for part in served.client.stream(ASKED, PLAIN)]
        assert [part.text for part in parts] == list(WORDS)
        first = served.backend.asks[0]
        assert (first.messages, first.tools, first.token_ids) == (ASKED, (GO,), [])
        assert (first.session_id, first.priority) == ("s", 2)


async def test_what_the_engine_is_asked_is_what_was_asked_for(scripted: Serving) -> None:
    options = CallOptions(request_id="r", session_id="s", priority=-7, adapter="fast", tools=(GO,))
    sampling = SamplingParams(0.5, 0.9, 3, 7, -(2**63), ("x", "y"), (3, 4), "a+")
    await scripted.client.generate(ASKED, sampling, options)
    await scripted.client.generate(continued((4, 5)), SamplingParams(json_schema="{}"))
    await scripted.client.generate([6, 7], PLAIN)
    first, second, third = scripted.backend.asks
    assert (first.sampling, first.messages, list(first.token_ids)) == (sampling, (), [1] * 4)
    assert (first.request_id, first.session_id, first.priority, first.adapter) == ("r", "s", -7, "fast")
    assert (list(second.token_ids), second.sampling.json_schema) == ([4, 5, 2, 2], "{}")
    assert (list(third.token_ids), third.sampling) == ([6, 7], PLAIN)


async def test_what_makes_no_sense_is_refused_before_the_engine_sees_it(scripted: Serving) -> None:
    client = scripted.client
    tools = CallOptions(tools=(GO,))
    invalid = Reason.INVALID_FIELD
    outside = Reason.TOKEN_OUT_OF_VOCABULARY
    cases: list[tuple[Any, Reason, dict[str, str]]] = [
        (generate(client, []), Reason.EMPTY_PROMPT, {"field": "token_ids"}),
        (generate(client, ()), Reason.EMPTY_PROMPT, {"field": "messages"}),
        (generate(client, continued(())), Reason.EMPTY_PROMPT, {"field": "continuation.token_ids"}),
        (generate(client, Continuation((1,), True, ())), Reason.EMPTY_PROMPT, {"field": "continuation.messages"}),
        (client.tokenize(()), Reason.EMPTY_PROMPT, {"field": "messages"}),
        (client.score([[1], []]), Reason.EMPTY_PROMPT, {"field": "sequences[1]"}),
        (generate(client, [1, 16]), outside, {"field": "prompt", "index": "1"}),
        (generate(client, continued((-1,))), outside, {"field": "prompt", "index": "0"}),
        (generate(client, stop_token_ids=(1, 2, 16)), outside, {"field": "sampling.stop_token_ids", "index": "2"}),
        (client.score([[1, 2], [1, 99]]), outside, {"field": "sequences[1]", "index": "1"}),
        (
            generate(client, [1] * 32),
            Reason.PROMPT_TOO_LONG,
            {"field": "prompt", "token_count": "32", "context_length": "32"},
        ),
        (client.score([[1] * 33]), Reason.PROMPT_TOO_LONG, {"field": "sequences[0]", "token_count": "33"}),
        (generate(client, temperature=1e-5), invalid, {"field": "sampling.temperature"}),
        (client.score([[1, 2]], 1e-5), invalid, {"field": "temperature"}),
        (client.sample(ASKED, SamplingParams(temperature=0), 2), invalid, {"field": "n"}),
        (anext(client.stream(ASKED, SamplingParams(temperature=0), 2)), invalid, {"field": "n"}),
        (generate(client, [1], tools), invalid, {"field": "tools"}),
        (generate(client, continued(), tools), invalid, {"field": "tools"}),
        (client.tokenize("go", tools), invalid, {"field": "tools"}),
        (generate(client, json_schema="{]"), invalid, {"field": "sampling.json_schema"}),
        (generate(client, json_schema="[1]"), invalid, {"field": "sampling.json_schema"}),
        (generate(client, json_schema="[" * 60000), invalid, {"field": "sampling.json_schema"}),
        (generate(client, options=CallOptions(adapter="quick")), Reason.UNKNOWN_ADAPTER, {"adapter": "quick"}),
        (client.score([[1, 2]], 1.0, CallOptions(adapter="quick")), Reason.UNKNOWN_ADAPTER, {"adapter": "quick"}),
    ]
    for call, reason, metadata in cases:
        await refused(call, reason, **metadata)
    assert scripted.backend.asks == []
    await generate(client, [1] * 31)
    await client.score([[1] * 32])


async def test_a_prompt_is_not_checked_against_sizes_that_nobody_knows() -> None:
    async with serving("one", create=Opened(context_length=0, vocabulary_size=0).create) as served:
        await served.client.generate([10**6] * 10_000, SamplingParams(stop_token_ids=(10**6,)))
        [ask] = served.backend.asks
        assert len(ask.token_ids) == 10_000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"policies": {"actor": {}}}, "default policy"),
        ({"policies": {"../x": {}}}, "pattern"),
        ({"policies": {"": {}}}, "pattern"),
        ({"default_policy": "a/b"}, "pattern"),
        ({"policies": {"other": {"modle": "x"}}}, "modle"),
    ],
)
def test_bad_names_are_refused_when_the_settings_are_read(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PolicySettings(**changes)
