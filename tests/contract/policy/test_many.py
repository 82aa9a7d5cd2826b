"""Requests that the client sends together, over gRPC: each has its own answer or error, whatever becomes of others."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.inference import CallOptions, SamplingParams
from mulligan.policy.client import PolicyClient
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from tests.support.llama_model import write_llama_model
from tests.support.policy import Serving, serving
from tests.support.scripted import Opened
from tests.support.waiting import until

PROMPT = [1, 2, 3]
PLAIN = SamplingParams()


@pytest.fixture
async def served() -> AsyncIterator[Serving]:
    async with serving("one", create=Opened().create) as running:
        yield running


def asked_for(client: PolicyClient, count: int) -> list[asyncio.Task[Any]]:
    """Requests of one moment, each with an id."""
    return [
        asyncio.create_task(client.generate([1 + number], PLAIN, CallOptions(request_id=f"r{number}")))
        for number in range(count)
    ]


async def test_each_has_the_answer_of_a_call_of_its_own() -> None:
    async with serving(deterministic=True) as running:
        hot = [SamplingParams(temperature=1.0, max_tokens=4 + number, seed=number) for number in range(20)]
        together = await asyncio.gather(*(running.client.generate(PROMPT, one) for one in hot))
        assert list(together) == [await running.client.generate(PROMPT, one) for one in hot]
        assert len({one.token_ids for one in together}) > 4


async def test_a_slow_one_holds_up_no_other(tmp_path: Path) -> None:
    async with serving(write_llama_model(tmp_path / "llama")) as running:
        long = SamplingParams(temperature=100.0, max_tokens=100, seed=3)
        slow = asyncio.create_task(running.client.generate(PROMPT, long))
        await asyncio.gather(*(running.client.generate(PROMPT, SamplingParams(max_tokens=1)) for _ in range(3)))
        assert not slow.done()
        assert len((await slow).token_ids) > 50


async def test_a_refused_one_says_what_a_call_of_its_own_says(served: Serving) -> None:
    bad: tuple[tuple[list[int], SamplingParams, CallOptions], ...] = (
        ([99], PLAIN, CallOptions()),  # no token of the vocabulary
        ([], PLAIN, CallOptions()),
        (PROMPT, PLAIN, CallOptions(policy="none")),
        (PROMPT, SamplingParams(temperature=-1.0), CallOptions()),  # the whole call is malformed
    )
    for wrong in bad:
        with pytest.raises(DomainError) as alone:
            await served.client.generate(*wrong)
        good = asked_for(served.client, 3)
        with pytest.raises(DomainError) as together:
            await served.client.generate(*wrong)
        assert (together.value.reason, str(together.value), together.value.metadata) == (
            alone.value.reason,
            str(alone.value),
            alone.value.metadata,
        )
        assert [len((await task).token_ids) for task in good] == [4, 4, 4]


async def test_a_fault_of_the_server_fails_only_its_own(served: Serving) -> None:
    served.backend.failures.append(RuntimeError("a broken engine"))
    with structlog.testing.capture_logs() as logged:
        results = await asyncio.gather(*asked_for(served.client, 3), return_exceptions=True)
    [failed] = [result for result in results if isinstance(result, BaseException)]
    assert isinstance(failed, CallFailed) and failed.code == "INTERNAL" and "a broken engine" not in str(failed)
    said = re.search(r"RuntimeError, incident ([0-9a-f]{8}): the server's log has it", str(failed))
    assert said is not None
    [line] = [line for line in logged if line.get("incident") == said[1]]
    assert "a broken engine" in str(line["exc_info"])


async def test_only_when_all_callers_are_gone_does_the_engine_stop(served: Serving) -> None:
    served.backend.go_on.clear()
    first, *others = asked_for(served.client, 3)
    await until(lambda: len(served.backend.asks) == 3)
    first.cancel()
    await asyncio.sleep(0)
    assert not served.backend.ended
    for task in others:
        task.cancel()
    await until(lambda: len(served.backend.ended) == 3)


class Recorded(pb_grpc.PolicyServiceServicer):
    """Answers with the request's id. `many` plays GenerateMany, which is not served without it."""

    def __init__(self, many: Callable[[pb.GenerateManyRequest, Any], AsyncIterator[Any]] | None):
        self.many = many
        self.alone: list[str] = []
        self.together: list[list[str]] = []

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        self.alone.append(request.request_id)
        return said(request)

    async def GenerateMany(
        self, request: pb.GenerateManyRequest, context: Any
    ) -> AsyncIterator[pb.GenerateManyResponse]:
        self.together.append([one.request_id for one in request.requests])
        if self.many is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
        async for message in self.many(request, context):  # type: ignore[misc]
            yield message


def said(request: pb.GenerateRequest) -> pb.GenerateResponse:
    completion = pb.Completion(text=request.request_id, stop_reason=pb.STOP_REASON_END_OF_TURN)
    return pb.GenerateResponse(completions=[completion])


def answer(index: int, **result: Any) -> pb.GenerateManyResponse.Item:
    return pb.GenerateManyResponse.Item(index=index, **result)


def items(request: pb.GenerateManyRequest, *indices: int) -> pb.GenerateManyResponse:
    return pb.GenerateManyResponse(items=[answer(one, response=said(request.requests[one])) for one in indices])


@asynccontextmanager
async def recorded(many: Any) -> AsyncIterator[tuple[Recorded, PolicyClient]]:
    servicer = Recorded(many)  # type: ignore[abstract]
    server = grpc.aio.server()
    pb_grpc.add_PolicyServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = PolicyClient(Endpoint(f"127.0.0.1:{port}", outage_seconds=20), timeout=300)
    yield servicer, client
    await client.close()
    await server.stop(None)


async def texts(*asked: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> list[str]:
    return [completion.text for completion in await asyncio.gather(*asked)]


async def test_requests_of_one_moment_are_one_call_and_one_alone_is_none_of_many() -> None:
    async def many(request: pb.GenerateManyRequest, context: Any) -> AsyncIterator[pb.GenerateManyResponse]:
        yield items(request, 2, 0)
        yield items(request, 1)

    async with recorded(many) as (servicer, client):
        assert await texts(*asked_for(client, 3)) == ["r0", "r1", "r2"]
        assert await texts(*asked_for(client, 1)) == ["r0"]
        assert (servicer.together, servicer.alone) == ([["r0", "r1", "r2"]], ["r0"])


async def test_requests_that_come_while_another_is_under_way_share_a_call() -> None:
    go_on = asyncio.Event()

    async def many(request: pb.GenerateManyRequest, context: Any) -> AsyncIterator[pb.GenerateManyResponse]:
        if len(request.requests) == 2:
            await go_on.wait()
        yield items(request, *range(len(request.requests)))

    async with recorded(many) as (servicer, client):
        slow = asked_for(client, 2)
        await until(lambda: len(servicer.together) == 1)
        later = []
        for number in range(3):  # each in a tick of its own
            later.append(asyncio.create_task(client.generate([1], PLAIN, CallOptions(request_id=f"later-{number}"))))
            await asyncio.sleep(0)
        assert await texts(*later) == ["later-0", "later-1", "later-2"]
        assert servicer.together == [["r0", "r1"], ["later-0", "later-1", "later-2"]] and not servicer.alone
        go_on.set()
        assert await texts(*slow) == ["r0", "r1"]


async def test_what_waits_when_the_client_is_closed_is_cancelled() -> None:
    async with recorded(lambda request, context: never()) as (servicer, client):
        asked = asked_for(client, 2)
        await until(lambda: len(servicer.together) == 1)
        asked += asked_for(client, 1)
        await asyncio.sleep(0)
        await client.close()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in found] == [asyncio.CancelledError] * 3


async def never() -> AsyncIterator[pb.GenerateManyResponse]:
    await asyncio.Event().wait()
    yield pb.GenerateManyResponse()


async def test_a_server_without_the_call_is_asked_one_by_one_and_not_again() -> None:
    async with recorded(None) as (servicer, client):
        for _ in range(2):
            assert await texts(*asked_for(client, 3)) == ["r0", "r1", "r2"]
        assert (servicer.together, servicer.alone) == ([["r0", "r1", "r2"]], ["r0", "r1", "r2"] * 2)


async def test_a_call_ends_when_nobody_waits_for_what_is_left_of_it() -> None:
    begun, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def many(request: pb.GenerateManyRequest, context: Any) -> AsyncIterator[pb.GenerateManyResponse]:
        begun.set()
        await go_on.wait()
        yield items(request, 1, 2)
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with recorded(many) as (_, client):
        first, *others = asked_for(client, 3)
        await begun.wait()
        first.cancel()
        go_on.set()
        assert await texts(*others) == ["r1", "r2"]
        await asyncio.wait_for(ended.wait(), 60)


async def leaves(request: pb.GenerateManyRequest, context: Any) -> AsyncIterator[pb.GenerateManyResponse]:
    yield items(request, 1)
    await context.abort(grpc.StatusCode.UNAVAILABLE, "shutting down")


async def forgets(request: pb.GenerateManyRequest, context: Any) -> AsyncIterator[pb.GenerateManyResponse]:
    yield items(request, 1)


async def repeats(request: pb.GenerateManyRequest, context: Any) -> AsyncIterator[pb.GenerateManyResponse]:
    yield items(request, 1, 1)


async def says_nothing(request: pb.GenerateManyRequest, context: Any) -> AsyncIterator[pb.GenerateManyResponse]:
    yield items(request, 1)
    yield pb.GenerateManyResponse(items=[answer(0)])


async def is_full(request: pb.GenerateManyRequest, context: Any) -> AsyncIterator[pb.GenerateManyResponse]:
    yield items(request, 1)
    full = pb.GenerateError(code=8, reason=Reason.QUEUE_FULL, message="full")
    full.retry_delay.FromTimedelta(timedelta(milliseconds=1))
    yield pb.GenerateManyResponse(items=[answer(2, error=full), answer(0, error=full)])


@pytest.mark.parametrize("many", [leaves, forgets, repeats, says_nothing, is_full])
async def test_what_is_not_answered_is_asked_again_alone(many: Any) -> None:
    async with recorded(many) as (servicer, client):
        assert await texts(*asked_for(client, 3)) == ["r0", "r1", "r2"]
        assert len(servicer.together) == 1 and sorted(servicer.alone) == ["r0", "r2"]
