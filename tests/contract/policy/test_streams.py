"""Streams and samples over gRPC: what comes when, and what ends when a caller leaves or an engine fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.inference import (
    CallOptions,
    CanaryProbe,
    CompletionPart,
    Continuation,
    Message,
    PublishedWeights,
    Role,
    SamplingParams,
    StopReason,
    WeightsKind,
)
from mulligan.policy.client import PolicyClient
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from mulligan.testing.weights import sha256
from tests.support.llama_model import write_llama_model
from tests.support.policy import Serving, serving
from tests.support.scripted import WORDS, Opened, ScriptedBackend
from tests.support.waiting import until

PROMPT = [1, 2, 3]
PLAIN = SamplingParams()


@pytest.fixture
async def served() -> AsyncIterator[Serving]:
    async with serving("one", create=Opened().create) as running:
        yield running


def of_sample(parts: list[CompletionPart], index: int) -> list[CompletionPart]:
    return [part for part in parts if part.index == index]


async def test_text_of_any_tokens_adds_up_and_no_character_is_split(tmp_path: Path) -> None:
    """A model that samples bytes at random, hot, in several samples at once."""
    async with serving(write_llama_model(tmp_path / "llama")) as running:
        decode = running.backend.decode
        hot = SamplingParams(temperature=100.0, max_tokens=120, seed=3)
        parts = [part async for part in running.client.stream([8, 9, 10], hot, 6)]
        whole = await running.client.sample([8, 9, 10], hot, 6)
        for index, completion in enumerate(whole):
            own = of_sample(parts, index)
            assert sum((part.token_ids for part in own), ()) == completion.token_ids
            assert "".join(part.text for part in own) == completion.text == decode(completion.token_ids)
            assert [part.stop_reason for part in own[:-1]] == [None] * (len(own) - 1)
            assert own[-1].stop_reason is completion.stop_reason
        assert any("\ufffd" in completion.text for completion in whole), "tokens that are half a character"
        assert len({completion.token_ids for completion in whole}) == 6


async def test_the_text_with_its_marks_comes_whole_in_answers_and_in_the_last_part_of_a_stream(served: Serving) -> None:
    for mark in ("", "[TOOL_CALLS]"):
        served.backend.mark = mark
        completion = await served.client.generate(PROMPT, PLAIN)
        assert completion.raw_text == (mark + completion.text if mark else "")
        assert completion.marked_text == mark + completion.text
        parts = await collect(served.client.stream(PROMPT, PLAIN))
        assert [part.raw_text for part in parts] == [""] * (len(parts) - 1) + [completion.raw_text]


async def test_parts_come_while_the_engine_works(served: Serving) -> None:
    backend = only_first(served)
    async with aclosing(served.client.stream(PROMPT, PLAIN)) as stream:
        first = await anext(stream)
        assert (first.index, first.token_ids, first.text, first.stop_reason) == (0, (0,), WORDS[0], None)
        rest = asyncio.create_task(collect(stream))
        await asyncio.sleep(0.05)
        assert not rest.done()
        backend.go_on.set()
        assert (await rest)[-1].stop_reason is StopReason.MAX_TOKENS


def only_first(served: Serving) -> ScriptedBackend:
    """The engine stops after the first part of each sample until it is told to go on."""
    backend: ScriptedBackend = served.backend
    backend.ahead = 1
    backend.go_on.clear()
    return backend


async def collect(stream: AsyncIterator[CompletionPart]) -> list[CompletionPart]:
    return [part async for part in stream]


async def test_the_prompt_is_told_once(served: Serving) -> None:
    asked = (Message(Role.USER, "go"),)
    for prompt, shown in ((asked, (1, 1)), (Continuation((4, 5), True, asked), (2, 2)), (PROMPT, ())):
        parts = await collect(served.client.stream(prompt, PLAIN, 3))
        assert [part.prompt_token_ids for part in parts] == [shown] + [()] * (len(parts) - 1)


@pytest.mark.parametrize("n", [1, 4])
async def test_a_stream_that_is_closed_ends_all_its_samples(served: Serving, n: int) -> None:
    backend = only_first(served)
    async with aclosing(served.client.stream(PROMPT, PLAIN, n)) as stream:
        await anext(stream)
        assert backend.ended == []
    await until(lambda: len(backend.ended) == n)
    await until(lambda: served.deployment.in_flight == 0)


@pytest.mark.parametrize("n", [1, 4])
async def test_a_call_that_is_cancelled_or_late_ends_all_its_samples(served: Serving, n: int) -> None:
    backend: ScriptedBackend = served.backend
    backend.go_on.clear()
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = pb_grpc.PolicyServiceStub(channel)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), n=n)
        cancelled = stub.Generate(request)
        await until(lambda: len(backend.asks) == n)
        assert backend.ended == []
        cancelled.cancel()
        await until(lambda: len(backend.ended) == n)
        for begin in (
            lambda seconds: stub.Generate(request, timeout=seconds),
            lambda seconds: stub.StreamGenerate(wrapped(request), timeout=seconds).read(),
        ):
            await too_late(begin, backend)
        await until(lambda: len(backend.ended) == len(backend.asks))
    await until(lambda: served.deployment.in_flight == 0)


async def too_late(begin: Callable[[float], Awaitable[Any]], backend: ScriptedBackend) -> None:
    """A call whose deadline passes at the engine. On a busy machine the first may not get so far."""
    before = len(backend.asks)
    for seconds in (0.1, 1.0, 10.0):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await begin(seconds)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if len(backend.asks) > before:
            return
    pytest.fail("no call reached the engine")


def wrapped(request: pb.GenerateRequest) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(request=request)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_sample_that_fails_ends_the_others(served: Serving, stream: bool) -> None:
    backend: ScriptedBackend = served.backend
    backend.failures.append(DomainError(Reason.MODEL_MISMATCH, "no such thing"))
    client = served.client
    call = collect(client.stream(PROMPT, PLAIN, 5)) if stream else client.sample(PROMPT, PLAIN, 5)
    with pytest.raises(DomainError, match="no such thing"):
        await call
    await until(lambda: len(backend.ended) == len(backend.asks) == 5)
    await until(lambda: served.deployment.in_flight == 0)


async def test_samples_have_seeds_that_derive_from_the_one_given(served: Serving) -> None:
    backend: ScriptedBackend = served.backend
    for seed in (7, 7, 8, -(2**63), None):
        await served.client.sample(PROMPT, replace(PLAIN, seed=seed), 8)
    seeds = [[ask.sampling.seed for ask in backend.asks[start : start + 8]] for start in range(0, 40, 8)]
    assert [group[0] for group in seeds] == [7, 7, 8, -(2**63), None]
    assert seeds[0] == seeds[1] and seeds[4] == [None] * 8
    known = {seed for group in seeds[1:4] for seed in group}
    assert len(known) == 24 and all(-(2**63) <= seed < 2**63 for seed in known if seed is not None)


async def test_an_error_after_the_first_part_is_told_and_the_call_is_not_repeated(served: Serving) -> None:
    backend = only_first(served)
    for error, raised, told in (
        (DomainError(Reason.ENGINE_UNAVAILABLE, "gone", retry_after=timedelta(0)), DomainError, "gone"),
        (RuntimeError("broken"), CallFailed, "RuntimeError, incident"),
    ):
        backend.asks.clear()
        async with aclosing(served.client.stream(PROMPT, PLAIN)) as stream:
            await anext(stream)
            backend.failures.append(error)
            backend.go_on.set()
            with pytest.raises(raised, match=told):
                await collect(stream)
        assert len(backend.asks) == 1
        backend.go_on.clear()


async def test_before_the_first_part_a_stream_is_repeated_as_a_call_is(served: Serving) -> None:
    backend: ScriptedBackend = served.backend
    client = PolicyClient(Endpoint(served.address, outage_seconds=30))
    full = [DomainError(Reason.QUEUE_FULL, "full", retry_after=timedelta(milliseconds=1)) for _ in range(3)]
    backend.failures += full
    parts = await collect(client.stream(PROMPT, PLAIN))
    assert len(backend.asks) == 4 and "".join(part.text for part in parts) == " ".join(WORDS)
    await client.close()
    backend.failures += full
    with pytest.raises(ServiceUnavailable, match="full"):
        await collect(served.client.stream(PROMPT, PLAIN))


async def test_a_stream_of_a_server_that_is_away_is_refused_in_the_end() -> None:
    client = PolicyClient(Endpoint("127.0.0.1:1", outage_seconds=0))
    with pytest.raises(ServiceUnavailable):
        await collect(client.stream(PROMPT, PLAIN))
    await client.close()


@dataclass
class Changing:
    """A service whose engine changes its weights under way. The check of the new ones waits for `judge`."""

    served: Serving
    backend: ScriptedBackend
    folder: Path

    async def update(self, log_prob: float) -> float | None:
        """The scripted engine scores each token -1."""
        path = self.folder / "weights"
        path.write_bytes(b"weights")
        canary = (CanaryProbe((1, 2, 3), (log_prob, log_prob)),)
        weights = PublishedWeights(1, WeightsKind.FULL, path.as_uri(), sha256(path), "one", canary)
        return await self.served.client.update_weights(weights)

    async def under_way(self, log_prob: float) -> asyncio.Task[float | None]:
        """Returns when the new weights are loaded, and not checked."""
        self.backend.judge.clear()
        task = asyncio.create_task(self.update(log_prob))
        await until(lambda: self.backend.policy_version == 1)
        return task


@pytest.fixture
async def changing(tmp_path: Path) -> AsyncIterator[Changing]:
    async with serving("one", create=Opened().create, weights_folder=tmp_path) as running:
        running.backend.go_on.clear()
        yield Changing(running, running.backend, tmp_path)


async def test_a_part_of_new_weights_waits_until_they_are_checked(changing: Changing) -> None:
    parts = asyncio.create_task(collect(changing.served.client.stream(PROMPT, PLAIN)))
    whole = asyncio.create_task(changing.served.client.generate(PROMPT, PLAIN))
    await until(lambda: len(changing.backend.asks) == 2)
    update = await changing.under_way(-1.0)
    changing.backend.go_on.set()
    await asyncio.sleep(0.1)
    assert not parts.done() and not whole.done() and not update.done()
    changing.backend.judge.set()
    assert await update == 0.0
    assert {span.policy_version for part in await parts for span in part.policy_versions} == {1}
    assert {span.policy_version for span in (await whole).policy_versions} == {1}
    assert len(changing.backend.asks) == 2, "nothing was sampled again"


async def test_what_refused_weights_sampled_is_not_answered(changing: Changing) -> None:
    """A call, and a stream of which nothing was given out, are sampled again; a stream that had begun ends."""
    client = changing.served.client
    only_first(changing.served)
    async with aclosing(client.stream(PROMPT, PLAIN)) as begun:
        first = await anext(begun)
        changing.backend.ahead = 0
        rest = asyncio.create_task(collect(begun))
        others = [
            asyncio.create_task(collect(client.stream(PROMPT, PLAIN))),
            asyncio.create_task(collect(client.stream(PROMPT, PLAIN, 3))),
        ]
        calls = [asyncio.create_task(client.sample(PROMPT, PLAIN, n)) for n in (1, 3)]
        await until(lambda: len(changing.backend.asks) == 9)
        update = await changing.under_way(-1.5)
        changing.backend.go_on.set()
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in (rest, *others, *calls))
        changing.backend.judge.set()
        with pytest.raises(DomainError) as caught:
            await update
        assert caught.value.reason is Reason.CANARY_FAILED
        with pytest.raises(DomainError, match="ask again") as caught:
            await rest
        assert caught.value.reason is Reason.CANARY_FAILED
    spans = [first.policy_versions]
    spans += [part.policy_versions for parts in await asyncio.gather(*others) for part in parts]
    spans += [completion.policy_versions for completions in await asyncio.gather(*calls) for completion in completions]
    assert {span.policy_version for each in spans for span in each} == {0}
    assert len(changing.backend.asks) > 9
    assert (await client.info()).policy_version == 0


async def test_a_rollback_under_way_does_not_answer_with_less_than_was_asked_for(changing: Changing) -> None:
    client = changing.served.client
    options = CallOptions(min_policy_version=1)
    await changing.update(-1.0)
    calls = [
        asyncio.create_task(collect(client.stream(PROMPT, PLAIN, 1, options))),
        asyncio.create_task(client.sample(PROMPT, PLAIN, 1, options)),
        asyncio.create_task(client.sample(PROMPT, PLAIN, 3, options)),
    ]
    await until(lambda: len(changing.backend.asks) == 5)
    await client.rollback(0)
    changing.backend.go_on.set()
    for call in calls:
        with pytest.raises(DomainError, match="at least 1") as caught:
            await call
        assert caught.value.reason is Reason.POLICY_VERSION_TOO_OLD
        assert caught.value.metadata["policy_version"] == "0"
