"""One caller cannot take a policy's memory or its event loop from the others, over gRPC.

What would take them is counted, and never how long it takes: texts that are rendered and tokenised, samples that are
begun, patterns that are compiled.
"""

from __future__ import annotations

import asyncio
import re
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.errors import Code, DomainError, Reason, ServiceUnavailable
from mulligan.common.inference import (
    CallOptions,
    Continuation,
    Feature,
    Message,
    Role,
    SamplingParams,
    Tool,
    ToolCall,
)
from mulligan.common.v1 import message_pb2
from mulligan.policy import servicer
from mulligan.policy.backend import Scored
from mulligan.policy.backends.transformers.constraints import Constraint, Constraints
from mulligan.policy.huggingface.tokenizer import Tokenizer
from mulligan.policy.policy import Policy
from mulligan.policy.text_length import _PIECE
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from tests.support.llama_model import CONTEXT_LENGTH, TOOLS_TEMPLATE, write_llama_model
from tests.support.policy import Serving, serving
from tests.support.scripted import Opened, ScriptedBackend
from tests.support.waiting import until

ROOM = CONTEXT_LENGTH - 1
SHORT = SamplingParams(max_tokens=1)
USER = Message(Role.USER, "A")
HUGE = "A b. " * 2**19  # characters that no 2,047 tokens hold
CALLED = Message(Role.ASSISTANT, "", (ToolCall("go", f'{{"to": "{HUGE}"}}'),))
TOOL = Tool("go", "Goes", '{"type": "object", "properties": {}}')


class Seen:
    """The texts that were tokenised, and the threads in which templates were rendered."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lengths: list[int] = []
        self.threads: list[str] = []
        encode, spans, template = Tokenizer.encode, Tokenizer._spans, Tokenizer._template

        def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
            self.lengths.append(len(text))
            return encode(tokenizer, text)

        def spanned(tokenizer: Tokenizer, text: str) -> Any:
            self.lengths.append(len(text))
            return spans(tokenizer, text)

        def rendered(tokenizer: Tokenizer, *given: Any, **options: Any) -> str:
            self.threads.append(threading.current_thread().name)
            return template(tokenizer, *given, **options)

        patch.setattr(Tokenizer, "encode", encoded)
        patch.setattr(Tokenizer, "_spans", spanned)
        patch.setattr(Tokenizer, "_template", rendered)

    def forget(self) -> None:
        self.lengths.clear()
        self.threads.clear()


@pytest.fixture
async def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Serving, Seen]]:
    seen = Seen(monkeypatch)
    async with serving(write_llama_model(tmp_path / "llama", template=TOOLS_TEMPLATE)) as running:
        seen.forget()
        yield running, seen


async def refused(call: Awaitable[Any]) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await call
    return caught.value


async def is_full(call: Awaitable[Any]) -> bool:
    """Whether there is no room for it, and the client is told when to repeat it; this client does not."""
    with pytest.raises(ServiceUnavailable) as caught:
        await call
    refusal = caught.value.refusal
    return refusal is not None and refusal.reason is Reason.QUEUE_FULL and refusal.retry_after is not None


def said(text: str) -> tuple[Message, ...]:
    return (Message(Role.USER, text),)


Call = Callable[[Any], Awaitable[Any]]
TOO_LONG: dict[str, Call] = {
    "a message": lambda client: client.generate(said(HUGE), SHORT),
    "many messages": lambda client: client.generate(said("A b. " * 300) * 2000, SHORT),
    "a call": lambda client: client.generate((USER, CALLED), SHORT),
    "a tool": lambda client: client.generate((USER,), SHORT, CallOptions(tools=(Tool("go", HUGE, "{}"),))),
    "a tool's parameters": lambda client: client.generate(
        (USER,), SHORT, CallOptions(tools=(Tool("go", "", f'{{"title": "{HUGE}"}}'),))
    ),
    "several samples": lambda client: client.sample(said(HUGE), SamplingParams(), 3),
    "a stream": lambda client: anext(client.stream(said(HUGE), SHORT)),
    "a continuation": lambda client: client.generate(Continuation((5,), True, said(HUGE)), SHORT),
    "a full continuation": lambda client: client.generate(Continuation((5,) * CONTEXT_LENGTH, True, said("A")), SHORT),
}


@pytest.mark.parametrize("name", TOO_LONG)
async def test_a_prompt_that_cannot_fit_is_neither_rendered_nor_tokenised(
    name: str, watched: tuple[Serving, Seen]
) -> None:
    running, seen = watched
    error = await refused(TOO_LONG[name](running.client))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, Reason.PROMPT_TOO_LONG)
    assert error.metadata["field"] == "prompt" and error.metadata["context_length"] == str(CONTEXT_LENGTH)
    assert ROOM < int(error.metadata["token_count"]) < 2**20
    assert name == "a full continuation" or f"at least {error.metadata['token_count']} tokens" in error.message
    assert not seen.lengths and not seen.threads


@pytest.mark.parametrize("text", ["A b. " * 50_000, "é" * 200_000, "<|eot_id|>" * 20_000])
async def test_a_text_with_too_many_tokens_is_not_tokenised_whole(text: str, watched: tuple[Serving, Seen]) -> None:
    running, seen = watched
    for call in (
        running.client.generate(said(text), SHORT),
        running.client.generate(Continuation((5,) * 9, True, said(text)), SHORT),
    ):
        error = await refused(call)
        assert error.reason is Reason.PROMPT_TOO_LONG and "at least" in error.message
        assert ROOM < int(error.metadata["token_count"]) <= 2 * len(text)
        assert set(seen.threads) <= {thread for thread in seen.threads if thread.startswith("policy-prompts")}
        if not text.startswith("<"):  # of that one, each literal is tokenised by itself, and where they are in one go
            assert max(seen.lengths) <= _PIECE and sum(seen.lengths) <= 2 * _PIECE
        seen.forget()


async def test_what_the_template_leaves_out_counts_for_nothing(watched: tuple[Serving, Seen]) -> None:
    """Half a million spaces, which it trims."""
    running, _ = watched
    spaced = await running.client.generate(said(" " * 250_000 + "A" + "\n" * 250_000), SHORT)
    assert spaced.prompt_token_ids == (await running.client.generate((USER,), SHORT)).prompt_token_ids


async def test_a_prompt_that_is_just_too_long_is_counted(watched: tuple[Serving, Seen]) -> None:
    running, _ = watched
    fixed = len((await running.client.generate(said("é"), SHORT)).prompt_token_ids) - 2
    even = (ROOM - fixed) // 2  # two tokens each
    await running.client.generate(said("é" * even), SHORT)
    error = await refused(running.client.generate(said("é" * (even + 1)), SHORT))
    assert error.metadata["token_count"] == str(fixed + 2 * even + 2)
    assert error.message == f"prompt: {fixed + 2 * even + 2} tokens; the context leaves room for {ROOM}"


async def test_tokenize_answers_as_many_tokens_as_it_says(watched: tuple[Serving, Seen]) -> None:
    running, seen = watched
    client = running.client
    assert len(await client.tokenize("é" * 32_768)) == 65_536
    error = await refused(client.tokenize("é" * 32_769))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, Reason.PROMPT_TOO_LONG)
    assert error.metadata == {"field": "text", "token_count": "65538", "context_length": str(CONTEXT_LENGTH)}
    assert error.message == "text: 65538 tokens; Tokenize answers 65536 at most"
    far: dict[str, Any] = {
        "text": "é" * 1_000_000,
        "messages": said("é" * 1_000_000),
        "continuation": Continuation((5,) * 70_000, True, said("é" * 1_000_000)),
    }
    for field, prompt in far.items():
        seen.forget()
        error = await refused(client.tokenize(prompt))
        assert (error.reason, error.metadata["field"]) == (Reason.PROMPT_TOO_LONG, field)
        assert "at least" in error.message and int(error.metadata["token_count"]) <= 2_000_100
        assert max(seen.lengths) <= _PIECE and sum(seen.lengths) <= 2 * _PIECE
    seen.forget()
    largest: tuple[Any, ...] = ("A" * 15_000_000, said("A" * 15_000_000))  # more than this server receives
    for prompt in largest:
        assert (await refused(running.policies.tokenize(prompt))).reason is Reason.PROMPT_TOO_LONG
    assert not seen.lengths and not seen.threads


LARGE = " A" * 10_001
BESIDE: dict[str, Call] = {
    "a message": lambda client: client.generate(said(LARGE), SHORT),
    "a call": lambda client: client.generate(
        (USER, Message(Role.ASSISTANT, "", (ToolCall("go", f'{{"to": "{LARGE}"}}'),))), SHORT
    ),
    "many calls": lambda client: client.generate(
        (USER, *[Message(Role.ASSISTANT, "", (ToolCall("go", "{}"),) * 128)] * 3), SHORT
    ),
    "a tool": lambda client: client.generate((USER,), SHORT, CallOptions(tools=(Tool("go", LARGE, "{}"),))),
    "many tools": lambda client: client.tokenize((USER,), CallOptions(tools=(Tool("go", "x" * 200, "{}"),) * 100)),
}


@pytest.mark.parametrize("name", BESIDE)
async def test_all_that_is_rendered_decides_whether_it_is_beside_the_event_loop(
    name: str, watched: tuple[Serving, Seen]
) -> None:
    running, seen = watched
    await asyncio.gather(BESIDE[name](running.client), return_exceptions=True)  # some of them are too long
    assert seen.threads and all(thread.startswith("policy-prompts") for thread in seen.threads), seen.threads
    seen.forget()
    await running.client.tokenize((USER,), CallOptions(tools=(TOOL,)))
    assert seen.threads == [threading.main_thread().name]


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[Serving, Opened]]:
    opened = Opened(capacity=300)
    async with serving("one", create=opened.create) as running:
        yield running, opened
        opened["one"].go_on.set()


def stub_of(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.PolicyServiceStub(channel)


def many(count: int, n: int, text: str = "hi") -> pb.GenerateManyRequest:
    messages = pb.Messages(messages=[message_pb2.Message(role=message_pb2.ROLE_USER, content=text)])
    one = pb.GenerateRequest(messages=messages, n=n, sampling=pb.SamplingParams(temperature=1.0))
    return pb.GenerateManyRequest(requests=[one] * count)


async def test_samples_beyond_the_queue_are_refused_before_they_are_begun(scripted: tuple[Serving, Opened]) -> None:
    """Each request by itself: 256 of 300 are begun, then 30, and of those that follow none has room."""
    running, opened = scripted
    backend = opened["one"]
    backend.go_on.clear()
    request = many(20, 256)
    request.requests[3].n = 30
    items: dict[int, pb.GenerateManyResponse.Item] = {}
    async with grpc.aio.insecure_channel(running.address) as channel:
        call = stub_of(channel).GenerateMany(request)

        async def read() -> None:
            async for message in call:
                items.update({item.index: item for item in message.items})

        reading = asyncio.create_task(read())
        await until(lambda: len(items) == 18 or len(backend.asks) > 300)
        assert len(backend.asks) == 286 and not {0, 3} & set(items)
        for item in items.values():
            error = item.error
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], Reason.QUEUE_FULL)
            assert error.retry_delay.ToTimedelta().total_seconds() > 0
        assert await is_full(running.client.sample(said("hi"), SamplingParams(), 15))
        assert await is_full(anext(running.client.stream(said("hi"), SamplingParams(), 15)))
        assert len(backend.asks) == 286
        fits = asyncio.create_task(running.client.sample(said("hi"), SamplingParams(), 14))
        await until(lambda: len(backend.asks) == 300)
        assert await is_full(running.client.generate(said("hi"), SHORT))
        backend.go_on.set()
        await reading
        assert len(items[0].response.completions) == 256 and len(items[3].response.completions) == 30
        assert len(await fits) == 14
        assert len(await running.client.sample(said("hi"), SamplingParams(), 256)) == 256, "there is room again"


async def test_room_may_be_gone_when_a_prompt_is_rendered(scripted: tuple[Serving, Opened]) -> None:
    """All of these find room while none is begun, and are rendered in threads."""
    running, opened = scripted
    opened["one"].go_on.clear()
    errors: list[str] = []
    async with grpc.aio.insecure_channel(running.address) as channel:
        call = stub_of(channel).GenerateMany(many(9, 256, "x" * 21_000))

        async def read() -> None:
            async for message in call:
                errors.extend(item.error.reason for item in message.items)

        reading = asyncio.create_task(read())
        await until(lambda: len(errors) == 8 or len(opened["one"].asks) > 300)
        assert errors == [Reason.QUEUE_FULL] * 8 and len(opened["one"].asks) == 256
        opened["one"].go_on.set()
        await reading


async def test_callers_that_leave_make_room(scripted: tuple[Serving, Opened]) -> None:
    running, opened = scripted
    backend = opened["one"]
    backend.go_on.clear()
    for _ in range(3):
        call = asyncio.create_task(running.client.sample(said("hi"), SamplingParams(), 256))
        await until(lambda: len(backend.asks) == 256)
        call.cancel()
        await until(lambda: len(backend.ended) == 256)
        backend.asks.clear()
        backend.ended.clear()


async def test_an_engine_that_tells_no_capacity_has_the_queue_of_its_settings() -> None:
    opened = Opened()
    async with serving("one", create=opened.create, max_queue=4) as running:
        opened["one"].go_on.clear()
        calls = [asyncio.create_task(running.client.sample(said("hi"), SamplingParams(), 256))]
        await until(lambda: len(opened["one"].asks) == 256)
        assert await is_full(running.client.sample(said("hi"), SamplingParams(), 5))
        calls.append(asyncio.create_task(running.client.sample(said("hi"), SamplingParams(), 4)))
        await until(lambda: len(opened["one"].asks) == 260)
        opened["one"].go_on.set()
        await asyncio.gather(*calls)


@pytest.mark.parametrize("settings", [{"max_batch": 3, "max_queue": 2}, {"max_queue": 2, "deterministic": True}])
async def test_an_engine_is_asked_for_no_more_samples_than_it_takes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = 0

    async with serving(write_llama_model(tmp_path / "llama"), **settings) as running:
        generate = running.backend.generate

        async def counted(ask: Any) -> Any:
            nonlocal begun
            begun += 1
            return await generate(ask)

        monkeypatch.setattr(running.backend, "generate", counted)
        most = running.backend.model.capacity
        assert most == (3 if running.backend.model.deterministic else 5)
        error = await refused(running.client.sample((USER,), SHORT_HOT, most + 1))
        assert (error.code, error.reason, error.retry_after) == (Code.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL, None)
        assert error.message.startswith(f"n: expected at most {most}, ") and error.message.endswith(f" not {most + 1}")
        assert begun == 0
        assert len(await running.client.sample((USER,), SHORT_HOT, most)) == most == begun


SHORT_HOT = SamplingParams(temperature=1.0, max_tokens=1)


async def test_a_request_that_never_has_room_is_not_told_to_come_again() -> None:
    """However it comes, and also while others run. A client would repeat it until its outage time is over."""
    opened = Opened(capacity=3)
    async with serving("one", create=opened.create) as running:
        opened["one"].go_on.clear()
        others = asyncio.create_task(running.client.sample(said("hi"), SHORT_HOT, 2))
        await until(lambda: len(opened["one"].asks) == 2)
        for call in (
            running.client.sample(said("hi"), SHORT_HOT, 4),
            anext(running.client.stream(said("hi"), SHORT_HOT, 4)),
        ):
            error = await refused(call)
            assert (error.reason, error.retry_after) == (Reason.QUEUE_FULL, None)
        async with grpc.aio.insecure_channel(running.address) as channel:
            answers = [message async for message in stub_of(channel).GenerateMany(many(1, 4))]
            [item] = answers[0].items
            assert item.error.reason == Reason.QUEUE_FULL and not item.error.HasField("retry_delay")
        assert await is_full(running.client.sample(said("hi"), SHORT_HOT, 3)), "this one has room later"
        opened["one"].go_on.set()
        await others
        assert len(await running.client.sample(said("hi"), SHORT_HOT, 3)) == 3


async def test_prompts_of_one_call_are_begun_in_several_rounds_of_the_event_loop(
    scripted: tuple[Serving, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all other calls would wait until the last of them was rendered."""
    running, _ = scripted
    rounds = 0
    begun: list[int] = []
    loop = asyncio.get_running_loop()
    sample = Policy.sample

    def tick() -> None:
        nonlocal rounds
        rounds += 1
        handle[0] = loop.call_soon(tick)

    handle = [loop.call_soon(tick)]

    async def counted(policy: Policy, *given: Any) -> Any:
        begun.append(rounds)
        return await sample(policy, *given)

    monkeypatch.setattr(Policy, "sample", counted)
    try:
        async with grpc.aio.insecure_channel(running.address) as channel:
            messages = [message async for message in stub_of(channel).GenerateMany(many(40, 1, "x" * 12_000))]
            large = [begun.count(one) for one in set(begun)]
            begun.clear()
            _ = [message async for message in stub_of(channel).GenerateMany(many(40, 1))]
    finally:
        handle[0].cancel()
    assert sum(len(message.items) for message in messages) == sum(large) == 40
    assert max(large) <= 3, "24 kB in a round, and one more"
    assert len(set(begun)) == 1, "small ones stay together: the engine batches them"


async def test_token_ids_that_cannot_fit_never_become_objects(
    scripted: tuple[Serving, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, _ = scripted
    client = running.client

    def made(*given: Any) -> Any:
        raise AssertionError("made")

    monkeypatch.setattr(servicer, "prompt_from_proto", made)
    for call, field, count in (
        (client.generate([1] * 32, SHORT), "prompt", "32"),
        (client.generate([1] * 1_000_000, SHORT), "prompt", "1000000"),
        (client.generate(Continuation((1,) * 500, True, (USER,)), SHORT), "prompt", "500"),
        (anext(client.stream([1] * 32, SHORT)), "prompt", "32"),
        (client.score([[1, 2], [1] * 33]), "sequences[1]", "33"),
    ):
        error = await refused(call)
        assert error.reason is Reason.PROMPT_TOO_LONG
        assert error.metadata == {"field": field, "token_count": count, "context_length": "32"}


COPIED = 300_000  # token ids, which take 36 bytes each where they are copied


async def peak(call: Awaitable[Any]) -> int:
    """Bytes that Python and numpy took at most, at one time. The message that the call reads is not among them."""
    tracemalloc.start()
    try:
        await call
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


async def test_token_ids_of_a_message_are_not_copied_where_their_number_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[list[int]]] = []

    async def score(backend: Any, sequences: Any, temperature: float, adapter: str = "") -> Scored:
        asked.append([list(ids[-2:]) for ids in sequences])
        return Scored(((),) * len(sequences), 0)

    monkeypatch.setattr(ScriptedBackend, "score", score)
    ids = pb.TokenIds(ids=range(10**6, 10**6 + COPIED))
    longer = pb.TokenIds(ids=range(10**6, 10**6 + COPIED + 1))
    messages = [message_pb2.Message(role=message_pb2.ROLE_USER, content="A")]
    continued = pb.Continuation(token_ids=longer.ids, messages=messages)
    plain, words = (
        Opened(context_length=COPIED, vocabulary_size=2**31 - 1),
        Opened(features=frozenset(Feature) - {Feature.TOKEN_IDS}),
    )
    async with serving("one", create=plain.create) as tokens, serving("one", create=words.create) as texts:
        service, without = servicer.PolicyServicer(tokens.policies), servicer.PolicyServicer(texts.policies)
        generates = [pb.GenerateRequest(token_ids=longer), pb.GenerateRequest(continuation=continued)]
        too_long: list[Awaitable[Any]] = [service.Generate(request, None) for request in generates]
        too_long.append(service.Score(pb.ScoreRequest(sequences=[longer] * 9), None))
        for call in too_long:
            assert await peak(is_refused(call, Reason.PROMPT_TOO_LONG)) < COPIED
        for call in [without.Generate(request, None) for request in generates]:
            assert await peak(is_refused(call, Reason.UNSUPPORTED_OPTION)) < COPIED
        assert await peak(service.Tokenize(pb.TokenizeRequest(continuation=continued), None)) < COPIED
        assert await peak(service.Score(pb.ScoreRequest(sequences=[ids] * 9), None)) < 12 * COPIED, "8 of one's check"
        assert asked == [[[10**6 + COPIED - 2, 10**6 + COPIED - 1]] * 9]
        assert await peak(asyncio.to_thread(list, ids.ids)) > 30 * COPIED, "so it would be seen"


async def is_refused(call: Awaitable[Any], reason: Reason) -> None:
    assert (await refused(call)).reason is reason


def kept_by_re(pattern: str) -> bool:
    return any(pattern in key for key in re._cache)  # type: ignore[attr-defined]


async def test_no_regular_expression_of_a_caller_is_compiled_or_kept_by_the_service(
    scripted: tuple[Serving, Opened],
) -> None:
    running, opened = scripted
    for pattern in ("(up|down)+x{2}", "[a-z]" * 5000, "(a", "(" * 5000):
        await running.client.generate(said("hi"), SamplingParams(regex=pattern))
        assert opened["one"].asks[-1].sampling.regex == pattern
        assert not kept_by_re(pattern)
    re.compile("(up|down)+y{2}")
    assert kept_by_re("(up|down)+y{2}"), "so it would be seen"


async def test_an_engine_compiles_what_constrains_samples_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In threads that nothing else waits for. What is no regular expression and no schema is refused there."""
    threads: list[str] = []
    of = Constraints.of

    def watched_of(constraints: Constraints, sampling: SamplingParams) -> Constraint:
        threads.append(threading.current_thread().name)
        return of(constraints, sampling)

    monkeypatch.setattr(Constraints, "of", watched_of)
    async with serving(write_llama_model(tmp_path / "llama")) as running:
        for sampling, field in (
            (SamplingParams(regex="(a"), "sampling.regex"),
            (SamplingParams(regex="(" * 5000), "sampling.regex"),
            (SamplingParams(json_schema='{"type": "banana"}'), "sampling.json_schema"),
        ):
            error = await refused(running.client.generate((USER,), sampling))
            assert (error.reason, error.metadata["field"]) == (Reason.INVALID_FIELD, field)
        await running.client.generate((USER,), SamplingParams(regex="a{3}"))
    assert len(threads) == 4 and all(thread.startswith("policy-grammars") for thread in threads)
