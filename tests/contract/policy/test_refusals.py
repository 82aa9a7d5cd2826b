"""What a policy with any backend refuses, over gRPC, before an engine sees it; the engine serves on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import grpc
import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    Continuation,
    Feature,
    Message,
    Prompt,
    PublishedWeights,
    Role,
    SamplingParams,
    Tool,
    WeightsKind,
)
from mulligan.common.v1 import message_pb2
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from tests.support.policy_backends import BACKENDS, BOARD, Running, greedy, running

CONTEXT = 1024
NO_WEIGHTS = PublishedWeights(1, WeightsKind.FULL, "file:///etc/passwd", "0" * 64, "x")


@pytest.fixture(params=BACKENDS)
async def policy(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    async with running(request.param) as served:
        yield served


Call = Callable[[Running], Awaitable[Any]]


class Bad(NamedTuple):
    """`feature` is what the engine must have for the call to make sense, and `option` what its absence is refused by:
    then that is the answer."""

    call: Call
    reason: Reason
    field: str | None = None
    feature: Feature | None = None
    option: str = ""


def generate(
    prompt: Prompt, options: CallOptions | None = None, **sampling: Any
) -> Callable[[Running], Awaitable[Any]]:
    return lambda p: p.client.generate(prompt, SamplingParams(**sampling), options or CallOptions())


def score(*sequences: list[int], temperature: float = 1.0, options: CallOptions | None = None) -> Any:
    return lambda p: p.client.score(list(sequences), temperature, options or CallOptions())


def said(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(Role.USER, text) for text in texts)


def ids(call: Any, reason: Reason, field: str | None = None) -> Bad:
    return Bad(call, reason, field, Feature.TOKEN_IDS, "token_ids")


def continued(continuation: Continuation, reason: Reason) -> Bad:
    return Bad(generate(continuation), reason, None, Feature.TOKEN_IDS, "continuation")


def scores(call: Any, reason: Reason) -> Bad:
    return Bad(call, reason, None, Feature.SCORE, "sequences")


FIELD = Reason.INVALID_FIELD
EMPTY = Reason.EMPTY_PROMPT
OUT = Reason.TOKEN_OUT_OF_VOCABULARY
LONG = Reason.PROMPT_TOO_LONG
BAD_CALLS: dict[str, Bad] = {
    "empty prompt": ids(generate([]), EMPTY),
    "no messages": Bad(generate(()), EMPTY),
    "nothing to continue": continued(Continuation((), True, BOARD[1:]), EMPTY),
    "nothing said since": continued(Continuation((5,), True, ()), EMPTY),
    "id too high": ids(generate([5, 319]), OUT),
    "id far too high": ids(generate([2**31 - 1]), OUT),
    "negative id": ids(generate([-1]), OUT),
    "bad id in a continuation": continued(Continuation((-5,), True, BOARD[1:]), OUT),
    "prompt fills the context": ids(generate([5] * CONTEXT), LONG),
    "prompt beyond the context": ids(generate([5] * 5000), LONG),
    "messages too long": Bad(generate(said("A " * 30000)), LONG),
    "negative temperature": Bad(generate(BOARD, temperature=-1.0), FIELD, "sampling.temperature"),
    "tiny temperature": Bad(generate(BOARD, temperature=1e-9), FIELD, "sampling.temperature"),
    "temperature nan": Bad(generate(BOARD, temperature=float("nan")), FIELD, "sampling.temperature"),
    "top_p 0": Bad(generate(BOARD, top_p=0.0), FIELD, "sampling.top_p"),
    "top_k -1": Bad(generate(BOARD, top_k=-1), FIELD, "sampling.top_k"),
    "no tokens wanted": Bad(generate(BOARD, max_tokens=0), FIELD, "sampling.max_tokens"),
    "empty stop string": Bad(generate(BOARD, stop=("",)), FIELD, "sampling.stop[0]"),
    "too many stop strings": Bad(generate(BOARD, stop=("x",) * 17), FIELD, "sampling.stop"),
    "stop id too high": Bad(
        generate(BOARD, stop_token_ids=(319,)), OUT, None, Feature.STOP_TOKEN_IDS, "sampling.stop_token_ids"
    ),
    "stop id negative": Bad(
        generate(BOARD, stop_token_ids=(-1,)), OUT, None, Feature.STOP_TOKEN_IDS, "sampling.stop_token_ids"
    ),
    "no regular expression": Bad(generate(BOARD, regex="(a"), FIELD, "sampling.regex", Feature.REGEX, "sampling.regex"),
    "no JSON": Bad(
        generate(BOARD, json_schema="{]"), FIELD, "sampling.json_schema", Feature.JSON_SCHEMA, "sampling.json_schema"
    ),
    "no JSON schema": Bad(
        generate(BOARD, json_schema='{"type": "banana"}'), FIELD, None, Feature.JSON_SCHEMA, "sampling.json_schema"
    ),
    "surrogates": Bad(generate(said("\ud800")), FIELD),
    "tools that the template does not show": Bad(
        generate(BOARD, CallOptions(tools=(Tool("go", "", "{}"),))), FIELD, "", Feature.TOOLS, "tools"
    ),
    "a tool's answer that it does not show": Bad(
        generate((*BOARD, Message(Role.TOOL, "x", name="go"))), FIELD, "", Feature.TOOLS, "messages"
    ),
    "an unknown policy": Bad(generate(BOARD, CallOptions(policy="nobody")), Reason.UNKNOWN_POLICY),
    "an unknown adapter": Bad(generate(BOARD, CallOptions(adapter="nobody")), Reason.UNKNOWN_ADAPTER),
    "no samples": Bad(lambda p: p.client.sample(BOARD, greedy(), -1), FIELD, "n"),
    "too many samples": Bad(lambda p: p.client.sample(BOARD, SamplingParams(), 257), FIELD, "n"),
    "version not yet served": Bad(generate(BOARD, CallOptions(min_policy_version=1)), Reason.POLICY_VERSION_TOO_OLD),
    "version not served in time": Bad(
        generate(BOARD, CallOptions(min_policy_version=1, version_wait=0.01)), Reason.POLICY_VERSION_TOO_OLD
    ),
    "score nothing": Bad(score(), FIELD, "sequences"),
    "score an empty sequence": scores(score([5, 6], []), EMPTY),
    "score beyond the context": scores(score([5] * (CONTEXT + 1)), LONG),
    "score an unknown id": scores(score([5, 400]), OUT),
    "score a negative id": scores(score([5, 6], [-3, 5]), OUT),
    "score greedily": Bad(score([5, 6], temperature=0.0), FIELD, "temperature"),
    "score by an unknown adapter": scores(score([5, 6], options=CallOptions(adapter="nobody")), Reason.UNKNOWN_ADAPTER),
    "score a later version": scores(
        score([5, 6], options=CallOptions(min_policy_version=3)), Reason.POLICY_VERSION_TOO_OLD
    ),
    "weights of nowhere": Bad(
        lambda p: p.client.update_weights(NO_WEIGHTS), Reason.MODEL_MISMATCH, None, Feature.FULL_WEIGHTS, "kind"
    ),
}


async def test_bad_calls_say_what_is_wrong_and_the_engine_serves_on(policy: Running) -> None:
    before = await policy.client.generate(BOARD, greedy(max_tokens=3))
    for name, bad in BAD_CALLS.items():
        if bad.feature is not None and not policy.offers(bad.feature):
            await policy.refuses(bad.call(policy), bad.option, bad.feature)
        else:
            with pytest.raises(DomainError) as caught:
                await bad.call(policy)
            assert caught.value.reason is bad.reason, f"{name}: {caught.value}"
            assert bad.field is None or caught.value.metadata["field"] == bad.field, f"{name}: {caught.value.metadata}"
        after = await policy.client.generate(BOARD, greedy(max_tokens=3))
        assert (after.token_ids, after.text) == (before.token_ids, before.text), name


async def test_a_stream_is_refused_as_a_call_is(policy: Running) -> None:
    for name in ("no messages", "messages too long", "an unknown policy", "an unknown adapter", "top_p 0"):
        stream = {
            "no messages": policy.client.stream((), SamplingParams()),
            "messages too long": policy.client.stream(said("A " * 30000), SamplingParams()),
            "an unknown policy": policy.client.stream(BOARD, SamplingParams(), 1, CallOptions(policy="nobody")),
            "an unknown adapter": policy.client.stream(BOARD, SamplingParams(), 1, CallOptions(adapter="nobody")),
            "top_p 0": policy.client.stream(BOARD, SamplingParams(top_p=0.0)),
        }[name]
        with pytest.raises(DomainError) as caught:
            await anext(aiter(stream))
        assert caught.value.reason is BAD_CALLS[name].reason, name


async def test_conflicting_or_missing_parts_of_a_request_are_refused(policy: Running) -> None:
    """What only another client than ours can send."""
    async with grpc.aio.insecure_channel(policy.address) as channel:
        stub: Any = pb_grpc.PolicyServiceStub(channel)
        messages = pb.Messages(messages=[message_pb2.Message(role=message_pb2.ROLE_USER, content="A")])
        both = pb.SamplingParams(regex="a")
        both.MergeFrom(pb.SamplingParams(json_schema="{}"))  # a later member of a oneof replaces the earlier
        assert both.WhichOneof("constraint") == "json_schema"
        tools = [message_pb2.Tool(name="go", parameters="{}")]
        continuation = pb.Continuation(token_ids=[5], turn_closed=True, messages=messages.messages)
        for call, request in (
            (stub.Generate, pb.GenerateRequest()),
            (stub.Generate, pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), tools=tools)),
            (stub.Generate, pb.GenerateRequest(continuation=continuation, tools=tools)),
            (stub.Tokenize, pb.TokenizeRequest()),
            (stub.Tokenize, pb.TokenizeRequest(text="a", tools=tools)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, request
