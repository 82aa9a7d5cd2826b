"""A server that sends its callers elsewhere: nobody goes there. Prompts, actions and keys are for the address that the
settings name, and LoadModel's allow-list would be worth nothing otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.foreign import redirected
from mulligan.common.model_files import UnsupportedModel
from mulligan.env.base import Faulted
from mulligan.env.envs import openenv
from mulligan.policy.backends._servers.connection import HttpConnection, Unreachable, new_session
from mulligan.policy.backends.sglang.connection import SglangConnection
from mulligan.policy.backends.vllm.connection import VllmConnection
from tests.support.endpoint import MODELS, Asked, Reply, ScriptedEndpoint, answer, asks, backend, drained, scripted

STATUSES = [301, 302, 303, 307, 308]


@asynccontextmanager
async def redirecting(status: int, *, models: bool = True) -> AsyncIterator[tuple[ScriptedEndpoint, ScriptedEndpoint]]:
    """A server that redirects all calls, but with `models` those that list models; and the one that it names."""
    async with scripted(lambda asked: MODELS if asked.method == "GET" else answer()) as other:
        place = f"{other.address.replace('://', '://me:hidden@')}/x?key=hidden"

        def sends_on(asked: Asked) -> Reply:
            return MODELS if models and asked.method == "GET" else Reply("hidden", status, {"Location": place})

        async with scripted(sends_on) as first:
            yield first, other


def told(first: ScriptedEndpoint, other: ScriptedEndpoint, status: int, address: str = "") -> str:
    who = address or first.address
    return f"{who} answers with a redirect (HTTP {status}) to {other.address}/x, which is not followed"


@pytest.mark.parametrize("status", STATUSES)
async def test_no_prompt_goes_from_an_endpoint_to_another(status: int) -> None:
    async with redirecting(status) as (first, other), backend(first) as opened:
        for call in (opened.generate(asks()), drained(opened, asks())):
            with pytest.raises(DomainError) as caught:
                await call
            assert caught.value.reason is Reason.ENGINE_UNAVAILABLE
            assert told(first, other, status) in caught.value.message and "hidden" not in caught.value.message
        assert other.asked == []


async def test_an_endpoint_that_redirects_all_calls_is_not_opened() -> None:
    async with redirecting(307, models=False) as (first, other):
        with pytest.raises(UnsupportedModel) as caught:
            async with backend(first):
                pass
        assert told(first, other, 307) in str(caught.value) and other.asked == []


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("kind", [SglangConnection, VllmConnection])
async def test_no_call_of_an_engine_goes_to_another(kind: type[HttpConnection], status: int) -> None:
    async with redirecting(status, models=False) as (first, other), new_session() as session:
        connection = kind(session, first.address)

        async def streamed() -> None:
            async for _ in connection.generate_stream(b"{}", 30.0):
                pass

        calls = (connection.get("/models"), connection.control("/pause"), connection.generate(b"{}", 30.0), streamed())
        for call in calls:
            with pytest.raises(Unreachable) as caught:
                await call
            assert told(first, other, status) in str(caught.value) and "hidden" not in str(caught.value)
        assert len(first.asked) == len(calls) and other.asked == []


@pytest.mark.parametrize("status", STATUSES)
async def test_no_episode_goes_from_an_openenv_server_to_another(status: int) -> None:
    async with redirecting(status, models=False) as (first, other):
        url = first.address
        with pytest.raises(Faulted) as caught:
            await asyncio.to_thread(openenv.Session, openenv.Settings(url))
        assert told(first, other, status, "it") in str(caught.value) and url in str(caught.value)
        assert len(first.asked) == 1 and other.asked == []


@pytest.mark.parametrize(
    ("to", "shown"),
    [
        ("/v1/", "to /v1/, "),
        ("", "to no address, "),
        ("http://[::1", "to no address, "),
        ("https://h/\x1b[31m", "to https://h/\\x1b[31m, "),
        (f"https://h/{'a' * 1000}", " characters left out "),
    ],
)
def test_the_place_is_shown_cut_and_without_control_characters(to: str, shown: str) -> None:
    said = redirected("http://first", 302, to)
    assert shown in said and len(said) < 400 and said.isprintable()
