"""An OpenAI-compatible endpoint that refuses, stalls, breaks off or goes away, as the openai backend sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backends.openai import Settings as OpenAISettings
from mulligan.policy.backends.openai import backend as backend_module
from mulligan.policy.backends.openai import open as open_backend
from tests.support.endpoint import (
    KEY,
    MODELS,
    SOON,
    Reply,
    ScriptedEndpoint,
    answer,
    asks,
    backend,
    chats,
    delta,
    drained,
    refusal,
    scripted,
)
from tests.support.settings import model_settings
from tests.support.waiting import until

SECRET = "what-another-server-knows"
FAULTS: dict[str, tuple[Reply, Reason, str]] = {
    "401": (refusal(401, f"Incorrect API key {KEY}"), Reason.ENGINE_UNAVAILABLE, "refuses the credential (HTTP 401)"),
    "403": (refusal(403, f"{KEY} may not"), Reason.ENGINE_UNAVAILABLE, "refuses the credential (HTTP 403)"),
    "404": (refusal(404, "no such model"), Reason.ENGINE_UNAVAILABLE, "HTTP 404"),
    "429": (refusal(429, "slower"), Reason.ENGINE_UNAVAILABLE, "HTTP 429, incident "),
    "503": (Reply("<html>", 503, SOON), Reason.ENGINE_UNAVAILABLE, "HTTP 503"),
    "400": (
        refusal(400, "bad temperature", param="temperature"),
        Reason.INVALID_FIELD,
        "temperature: expected what http",
    ),
    "secrets": (refusal(422, f"{SECRET} {KEY}", param=SECRET), Reason.INVALID_FIELD, "request: expected what http"),
    "a page": (Reply("<html>hello</html>"), Reason.ENGINE_UNAVAILABLE, "no chat completion"),
    "no choices": (Reply({"object": "chat.completion"}), Reason.ENGINE_UNAVAILABLE, "no chat completion"),
    "aborted": (answer(finish="abort"), Reason.ENGINE_UNAVAILABLE, "ended for a reason of its own: incident "),
    "filtered": (answer(finish="content_filter"), Reason.INVALID_FIELD, "content filter"),
}


@pytest.mark.parametrize("name", list(FAULTS))
async def test_what_an_endpoint_refuses_is_said_with_its_address_and_never_with_the_key(
    name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    reply, reason, says = FAULTS[name]
    async with scripted(chats(reply, reply, answer("good"))) as endpoint, backend(endpoint) as opened:
        with pytest.raises(DomainError) as caught:
            await opened.generate(asks())
        repeated = name in ("429", "503")
        assert len(endpoint.chats) == (2 if repeated else 1)
        assert caught.value.reason is reason and says in caught.value.message
        if reason is Reason.ENGINE_UNAVAILABLE:
            assert endpoint.address in caught.value.message and caught.value.retry_after is not None
        assert opened.replicas[0].info.serving, "one bad answer does not take the endpoint out"
        if not repeated:
            with pytest.raises(DomainError):
                await opened.generate(asks())
        assert (await opened.generate(asks())).text == "good"
    output = capfd.readouterr()
    said = f"{caught.value} {caught.value.metadata}"
    assert KEY not in f"{said} {output} {caplog.text}"
    assert SECRET not in said and (SECRET in output.out) == (name == "secrets"), "it is for the log"


async def test_requests_that_are_refused_for_the_moment_are_repeated_and_the_wait_is_passed_on() -> None:
    busy = refusal(503, "loading")
    async with (
        scripted(chats(busy, busy, answer())) as endpoint,
        backend(endpoint, openai={"max_retries": 2}) as opened,
    ):
        assert (await opened.generate(asks())).text == "fine"
        assert len(endpoint.chats) == 3
    later = Reply({"error": {"message": "quota"}}, 429, {"retry-after": "7"})
    async with scripted(chats(later)) as endpoint, backend(endpoint, openai={"max_retries": 0}) as opened:
        with pytest.raises(DomainError) as caught:
            await opened.generate(asks())
    assert caught.value.retry_after is not None and caught.value.retry_after.total_seconds() == 7


@pytest.mark.parametrize(
    "events",
    [
        [delta(content="half"), None],
        [delta(content="half"), "[DONE]"],
        [delta(content="half"), {"error": {"code": 500}}],
    ],
)
async def test_a_stream_that_breaks_off_is_no_answer(events: list[Any]) -> None:
    async with scripted(chats(Reply(events=events))) as endpoint, backend(endpoint) as opened:
        parts = opened.stream(asks())
        assert (await anext(parts)).text == "half"
        with pytest.raises(DomainError) as caught:
            await anext(parts)
        assert caught.value.reason is Reason.ENGINE_UNAVAILABLE


async def test_a_cancelled_call_closes_its_connection_and_a_slow_one_has_its_time() -> None:
    waiting = Reply(events=[delta(content="a")], wait=True)
    async with (
        scripted(chats(Reply(wait=True), waiting, waiting, Reply(wait=True))) as endpoint,
        backend(endpoint, openai={"request_seconds": 0.5, "max_retries": 0}) as opened,
    ):
        call = asyncio.create_task(opened.generate(asks()))
        await until(lambda: len(endpoint.chats) == 1)
        assert opened.replicas[0].info.in_flight == 1
        call.cancel()
        await until(lambda: endpoint.gone == 1)
        stream: Any = opened.stream(asks())
        assert (await anext(stream)).text == "a"
        await stream.aclose()
        await until(lambda: endpoint.gone == 2)
        assert opened.replicas[0].info.in_flight == 0
        for slow in (drained(opened, asks()), opened.generate(asks())):
            with pytest.raises(DomainError) as caught:
                await slow
            assert caught.value.reason is Reason.ENGINE_UNAVAILABLE
        await until(lambda: endpoint.gone == 4)


async def test_more_requests_than_places_wait_and_more_than_the_queue_are_refused() -> None:
    settings = {"openai": {"concurrency": 1, "max_retries": 0}, "max_queue": 1}
    async with scripted(chats(Reply(wait=True), answer())) as endpoint, backend(endpoint, **settings) as opened:
        first = asyncio.create_task(opened.generate(asks()))
        await until(lambda: len(endpoint.chats) == 1)
        second = asyncio.create_task(opened.generate(asks()))
        await asyncio.sleep(0)
        for call in (opened.generate(asks()), drained(opened, asks())):
            with pytest.raises(DomainError) as caught:
                await call
            assert caught.value.reason is Reason.QUEUE_FULL and caught.value.retry_after is not None
        assert len(endpoint.chats) == 1 and not second.done()
        first.cancel()
        assert (await second).text == "fine"


async def test_an_endpoint_that_is_away_is_out_until_it_answers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "_PROBE_SECONDS", 0.02)
    async with scripted(chats(answer())) as endpoint, backend(endpoint, openai={"max_retries": 0}) as opened:
        [replica] = opened.replicas
        assert replica.info.serving and replica.info.address == endpoint.address
        await endpoint.stop()
        for _ in range(2):
            with pytest.raises(DomainError) as caught:
                await opened.generate(asks())
            assert caught.value.reason is Reason.ENGINE_UNAVAILABLE and endpoint.address in caught.value.message
            assert not replica.info.serving and endpoint.address in replica.info.problem
        await endpoint.start()
        await until(lambda: replica.info.serving)
        assert replica.info.problem == "" and (await opened.generate(asks())).text == "fine"


async def test_a_policy_starts_before_its_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "_PROBE_SECONDS", 0.02)
    others = Reply({"data": [{"id": "other"}]})
    listed = [others]
    endpoint = ScriptedEndpoint(lambda asked: listed[0] if asked.method == "GET" else answer())
    await endpoint.start()
    await endpoint.stop()
    async with backend(endpoint) as opened:
        [replica] = opened.replicas
        assert not replica.info.serving and "does not answer" in replica.info.problem
        await endpoint.start()
        await until(lambda: "does not serve the model m, but other" in replica.info.problem)
        listed[0] = MODELS
        await until(lambda: replica.info.serving)
        assert opened.model.context_length == 4096 and (await opened.generate(asks())).text == "fine"
    await endpoint.stop()


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Reply({"data": [{"id": "b"}, {"id": "a"}]}), "does not serve the model m, but a, b"),
        (refusal(401, f"Incorrect API key {KEY}"), "refuses the credential (HTTP 401)"),
    ],
)
async def test_a_model_that_the_endpoint_does_not_have_is_not_opened(reply: Reply, says: str) -> None:
    async with scripted(lambda _: reply) as endpoint:
        with pytest.raises(UnsupportedModel) as caught:
            async with backend(endpoint):
                pass
    assert says in str(caught.value) and endpoint.address in str(caught.value) and KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "file:///etc/passwd", "http://[::1", "http://h:port/v1"])
async def test_an_address_is_needed(url: str) -> None:
    settings = model_settings(backend="openai", model="m", openai=OpenAISettings(base_url=url))
    with pytest.raises(UnsupportedModel, match=r"openai\.base_url"):
        await open_backend(settings, Path(), 0)


async def test_a_credential_of_the_environment_or_in_the_address_stays_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "ambient-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer ambient-secret")
    async with scripted(lambda asked: Reply("no list", 404) if asked.method == "GET" else answer()) as endpoint:
        own = {"base_url": f"{endpoint.address}?key=hidden", "api_key": None}
        async with backend(endpoint, openai=own) as opened:
            await opened.generate(asks())
            assert opened.replicas[0].info.address == endpoint.address
    sent = [f"{name}: {value}" for asked in endpoint.asked for name, value in asked.headers.items()]
    assert [line for line in sent if "ambient-secret" in line] == []
