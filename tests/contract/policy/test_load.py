"""Many callers of a policy, callers that leave, and more than there is room for: with any backend, over gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from mulligan.common.errors import Reason
from mulligan.common.inference import CallOptions, Completion, Feature, Message, Role, SamplingParams, VersionSpan
from mulligan.common.status import from_rpc_error
from mulligan.common.v1 import message_pb2
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from mulligan.testing.weights import plain_log_probs
from tests.support.policy_backends import (
    BACKENDS,
    BOARD,
    LONG_PROMPT,
    Running,
    greedy,
    reference,
    running,
)
from tests.support.waiting import until_async

# One request at a time, and one that waits.
NARROW: dict[str, dict[str, Any]] = {
    "batched": {"max_batch": 1, "max_queue": 1},
    "deterministic": {"max_queue": 1},
    "sglang": {"max_queue": 1},
    "openai": {"max_queue": 1, "openai": {"concurrency": 1}},
}
# The endpoint is asked for long completions in words of its own.
ENDLESS: dict[str, dict[str, Any]] = {"openai": {"openai": {"extra_body": {"ignore_eos": True}}}}


def long_request(policy: Running, max_tokens: int = 1000) -> pb.GenerateRequest:
    """Hundreds of tokens long in any case."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=max_tokens)
    if policy.offers(Feature.TOKEN_IDS):
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=LONG_PROMPT), sampling=sampling)
    messages = [message_pb2.Message(role=message_pb2.ROLE_USER, content="A B C")]
    return pb.GenerateRequest(messages=pb.Messages(messages=messages), sampling=sampling)


def wide(name: str, *others: dict[str, dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for table in (ENDLESS, *others):
        for key, value in table.get(name, {}).items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return merged


LONG = [pytest.param(name, True, marks=pytest.mark.long) for name in ("sglang", "openai")]


@pytest.mark.parametrize(
    ("name", "streamed"),
    # SGLang's OpenAI endpoint looks only every few seconds whether the caller of a whole answer is still there.
    [("batched", False), ("batched", True), ("sglang", False), *LONG],
)
async def test_a_call_whose_caller_is_gone_stops_the_engine(name: str, streamed: bool) -> None:
    """Cancelled, or past its deadline; the caller beside them has its answer."""
    async with running(name, **wide(name)) as policy, grpc.aio.insecure_channel(policy.address) as channel:
        stub: Any = pb_grpc.PolicyServiceStub(channel)

        def begin(timeout: float | None = None) -> Any:
            if streamed:
                return stub.StreamGenerate(pb.StreamGenerateRequest(request=long_request(policy)), timeout=timeout)
            return stub.Generate(long_request(policy), timeout=timeout)

        async def works_on(count: int) -> bool:
            return await policy.engine_load() == count

        kept = stub.Generate(long_request(policy, 400))
        cancelled = begin()
        late = begin(timeout=0.2)
        assert await late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until_async(lambda: works_on(2))
        cancelled.cancel()
        await until_async(lambda: works_on(1))
        assert not kept.done(), "the others were stopped, and did not just end"
        [completion] = (await kept).completions
        assert completion.stop_reason == pb.STOP_REASON_MAX_TOKENS
        await until_async(lambda: works_on(0))


@pytest.mark.parametrize("name", BACKENDS)
async def test_a_full_queue_says_so_and_callers_that_leave_make_room(name: str) -> None:
    settings = wide(name, NARROW)
    async with running(name, **settings) as policy, grpc.aio.insecure_channel(policy.address) as channel:
        stub: Any = pb_grpc.PolicyServiceStub(channel)
        calls = [stub.Generate(long_request(policy)) for _ in range(20)]
        while not (refused := [call for call in calls if call.done()]):  # noqa: ASYNC110 - calls of gRPC's own
            await asyncio.sleep(0.01)
        for call in refused:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = from_rpc_error(caught.value)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error is not None and error.reason is Reason.QUEUE_FULL
            assert error.retry_after is not None and error.retry_after.total_seconds() > 0
        for call in calls:
            call.cancel()

        async def idle() -> bool:
            return await policy.engine_load() == 0

        await until_async(idle)
        answer = await stub.Generate(long_request(policy, 1))
        assert answer.completions[0].stop_reason == pb.STOP_REASON_MAX_TOKENS


@pytest.mark.parametrize("name", BACKENDS)
async def test_greater_priorities_go_first(name: str) -> None:
    settings = wide(name, {"batched": {"max_batch": 1}})
    async with running(name, **settings) as policy:
        if not policy.offers(Feature.PRIORITY):
            call = policy.client.generate(BOARD, greedy(), CallOptions(priority=1))
            return await policy.refuses(call, "priority", Feature.PRIORITY)
        ended: list[int] = []

        async def ask(priority: int) -> None:
            await policy.client.generate(BOARD, greedy(max_tokens=2), CallOptions(priority=priority))
            ended.append(priority)

        first = asyncio.create_task(policy.client.generate(LONG_PROMPT, greedy(max_tokens=400)))

        async def works_on(count: int) -> bool:
            return await policy.engine_load() == count

        await until_async(lambda: works_on(1))
        waiting = []
        for count, priority in enumerate((-5, 0, 3, 7), start=2):
            waiting.append(asyncio.create_task(ask(priority)))
            await until_async(lambda count=count: works_on(count))  # type: ignore[misc]
        assert not first.done()
        await asyncio.gather(first, *waiting)
        assert ended == [7, 3, 0, -5]
        return None


@pytest.mark.parametrize("name", BACKENDS)
async def test_many_callers_have_each_their_own_answer(name: str) -> None:
    """Also more of them than the engine has slots, with prompts that take several passes."""
    settings = {"batched": {"slots": 4, "tokens_per_pass": 16}}
    async with running(name, **settings.get(name, {})) as policy:
        questions = [(Message(Role.USER, " ".join("ABCDEFGH"[: 1 + index % 8]) + f" {index}"),) for index in range(40)]
        params = SamplingParams(temperature=1.0, max_tokens=5)
        answers: list[Completion] = await asyncio.gather(
            *(policy.client.generate(question, params) for question in questions)
        )
        likeliest = [(await policy.client.generate(question, greedy(max_tokens=5))).text for question in questions]
        together = await asyncio.gather(
            *(policy.client.generate(question, greedy(max_tokens=5)) for question in questions)
        )
        assert [completion.text for completion in together] == likeliest
        if not policy.offers(Feature.TOKEN_IDS):
            return
        for question, completion in zip(questions, answers, strict=True):
            assert completion.prompt_token_ids == await policy.client.tokenize(question)
            sequence = [*completion.prompt_token_ids, *completion.token_ids]
            expected = plain_log_probs(reference(), sequence)[len(completion.prompt_token_ids) - 1 :]
            assert completion.log_probs == pytest.approx(expected, abs=1e-4)
            assert completion.policy_versions == (VersionSpan(0, len(completion.token_ids)),)
