"""What a policy with any backend must do, over gRPC.

Each test says which features it needs. Where an engine lacks one, the test is that the option is refused, and that the
refusal names it. A new backend is added to `tests/support/policy_backends.py`.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    Completion,
    Continuation,
    Feature,
    Message,
    PolicyState,
    Prompt,
    Role,
    SamplingParams,
    StopReason,
    Tool,
    ToolCall,
    VersionSpan,
)
from mulligan.common.v1 import message_pb2
from mulligan.models import EMBEDDED
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from mulligan.testing.weights import plain_log_probs
from tests.support.policy_backends import (
    BACKENDS,
    BOARD,
    FEATURES,
    TRACE,
    Running,
    decode,
    encode,
    greedy,
    reference,
    running,
)

CONTEXTS = {"sglang": 1017}  # of 1024, SGLang keeps some to itself


@pytest.fixture(params=BACKENDS)
async def policy(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    async with running(request.param) as served:
        yield served


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 319, int(length)).tolist() for length in rng.integers(1, 60, count)]


def agrees(prompt: Sequence[int], completion: Completion, temperature: float = 1.0) -> bool:
    """Whether its log-probabilities are those of a plain forward pass of the same model."""
    expected = plain_log_probs(reference(), [*prompt, *completion.token_ids], temperature or 1.0)
    assert completion.log_probs == pytest.approx(expected[len(prompt) - 1 :], abs=1e-4)
    return True


async def test_it_describes_itself(policy: Running) -> None:
    info = policy.info
    assert info.features == FEATURES[policy.name]
    assert (info.policy_version, info.state, info.problem) == (0, PolicyState.SERVING, "")
    assert info.deterministic == (policy.name == "deterministic")
    assert info.context_length == CONTEXTS.get(policy.name, 1024)
    assert len(info.replicas) == 1 and info.replicas[0].serving and info.replicas[0].problem == ""
    if policy.offers(Feature.TOKEN_IDS):
        assert info.fingerprint and info.vocabulary_size == 319
        assert info.end_of_turn_token_ids == (1,) and not info.rewrites_history
    else:
        assert (info.fingerprint, info.vocabulary_size, info.end_of_turn_token_ids) == ("", 0, ())
        assert info.rewrites_history, "callers send all messages each turn"


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.3])
async def test_log_probs_are_those_of_a_plain_forward_pass(policy: Running, temperature: float) -> None:
    """Also with top-p and top-k, which log-probabilities ignore; greedy takes the likeliest token each time."""
    params = SamplingParams(temperature=temperature, top_p=0.9, max_tokens=12)
    if not policy.offers(Feature.TOKEN_IDS, Feature.LOG_PROBS):
        completion = await policy.client.generate(BOARD, params)
        assert completion.text and (completion.token_ids, completion.log_probs) == ((), ())
        return await policy.refuses(policy.client.generate([5, 6], params), "token_ids", Feature.TOKEN_IDS)
    params = replace(params, top_k=50)
    asked = random_prompts(12)
    completions = await asyncio.gather(*(policy.client.generate(prompt, params) for prompt in asked))
    for prompt, completion in zip(asked, completions, strict=True):
        assert agrees(prompt, completion, temperature)
        assert completion.prompt_token_ids == ()
        assert completion.policy_versions == (VersionSpan(0, len(completion.token_ids)),)
        if temperature == 0:
            ids = torch.tensor([prompt])
            settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "attention_mask": ids * 0 + 1}
            assert list(completion.token_ids) == reference().generate(ids, **settings)[0, len(prompt) :].tolist()
    return None


async def test_top_k_and_top_p_leave_only_the_likeliest(policy: Running) -> None:
    hot = SamplingParams(temperature=50.0, max_tokens=4)
    likeliest = (await policy.client.generate(BOARD, greedy(max_tokens=4))).text
    assert (await policy.client.generate(BOARD, replace(hot, top_p=1e-6))).text == likeliest
    narrow = replace(hot, top_k=1)
    if not policy.offers(Feature.TOP_K):
        return await policy.refuses(policy.client.generate(BOARD, narrow), "sampling.top_k", Feature.TOP_K)
    assert (await policy.client.generate(BOARD, narrow)).text == likeliest
    return None


async def test_score_is_a_plain_forward_pass_at_a_temperature(policy: Running) -> None:
    short = random_prompts(7, seed=3)
    full = [5 + index % 300 for index in range(policy.info.context_length)]
    if not policy.offers(Feature.SCORE):
        return await policy.refuses(policy.client.score(short, 1.0), "sequences", Feature.SCORE)
    if not policy.offers(Feature.SCORE_TEMPERATURE):
        await policy.refuses(policy.client.score(short, 0.7), "temperature", Feature.SCORE_TEMPERATURE)
    for temperature, sequences in ((1.0, [*short, full]), (0.7, short)):
        if temperature != 1 and not policy.offers(Feature.SCORE_TEMPERATURE):
            continue
        scored = await policy.client.score(sequences, temperature)
        assert scored.policy_version == 0
        assert [len(row) for row in scored.log_probs] == [len(sequence) - 1 for sequence in sequences]
        for sequence, row in zip(sequences, scored.log_probs, strict=True):
            assert row == pytest.approx(plain_log_probs(reference(), sequence, temperature), abs=1e-4)
    return None


async def test_a_seed_repeats_whatever_else_is_in_the_batch(policy: Running) -> None:
    asked = [(Message(Role.USER, f"{index} A B"),) for index in range(16)]
    params = [SamplingParams(temperature=4.0, max_tokens=8, seed=index) for index in range(16)]
    if not policy.offers(Feature.SEED):
        return await policy.refuses(policy.client.generate(asked[0], params[0]), "sampling.seed", Feature.SEED)
    calls = list(zip(asked, params, strict=True))
    alone = [await policy.client.generate(prompt, param) for prompt, param in calls]
    together = await asyncio.gather(*(policy.client.generate(prompt, param) for prompt, param in calls))
    assert [completion.text for completion in alone] == [completion.text for completion in together]
    if policy.info.deterministic:
        assert alone == together
    other = await policy.client.generate(asked[0], replace(params[0], seed=-(2**63)))
    assert other.text != alone[0].text
    return None


async def test_samples_of_one_call_differ_and_the_first_is_what_one_call_would_be(policy: Running) -> None:
    params = SamplingParams(temperature=3.0, max_tokens=8)
    samples = await policy.client.sample(BOARD, params, 5)
    assert len(samples) == 5 and len({sample.text for sample in samples}) > 2
    assert len({sample.prompt_token_ids for sample in samples}) == 1
    with pytest.raises(DomainError) as caught:
        await policy.client.sample(BOARD, replace(params, temperature=0.0), 2)
    assert caught.value.reason is Reason.INVALID_FIELD and caught.value.metadata["field"] == "n"
    if policy.offers(Feature.SEED):
        seeded = await policy.client.sample(BOARD, replace(params, seed=7), 5)
        assert [sample.text for sample in seeded] == [
            sample.text for sample in await policy.client.sample(BOARD, replace(params, seed=7), 5)
        ]
        assert seeded[0].text == (await policy.client.generate(BOARD, replace(params, seed=7))).text
        assert len({sample.text for sample in seeded}) > 2


async def test_a_stream_brings_what_one_answer_would(policy: Running) -> None:
    params = greedy(max_tokens=60)
    whole = await policy.client.generate(TRACE, params)
    parts = [part async for part in policy.client.stream(TRACE, params)]
    assert "".join(part.text for part in parts) == whole.text
    assert sum((part.token_ids for part in parts), ()) == whole.token_ids
    assert sum((part.log_probs for part in parts), ()) == pytest.approx(whole.log_probs, abs=1e-4)
    assert (parts[0].prompt_token_ids, parts[-1].stop_reason) == (whole.prompt_token_ids, whole.stop_reason)
    assert all(part.prompt_token_ids == () for part in parts[1:])
    assert all(part.stop_reason is None for part in parts[:-1])
    spans = [span for part in parts for span in part.policy_versions]
    assert {span.policy_version for span in spans} == {0}
    assert sum(span.token_count for span in spans) == len(whole.token_ids)
    assert len(parts) > 1, "not all at the end"


async def test_samples_of_a_stream_are_told_apart(policy: Running) -> None:
    parts = [part async for part in policy.client.stream(BOARD, SamplingParams(temperature=2.0, max_tokens=12), 4)]
    assert [part.prompt_token_ids != () for part in parts[1:]] == [False] * (len(parts) - 1)
    for index in range(4):
        own = [part for part in parts if part.index == index]
        assert [part.stop_reason is None for part in own] == [True] * (len(own) - 1) + [False]
        if policy.offers(Feature.TOKEN_IDS):
            token_ids = sum((part.token_ids for part in own), ())
            assert "".join(part.text for part in own) == decode(token_ids)
            prompt = parts[0].prompt_token_ids
            expected = plain_log_probs(reference(), [*prompt, *token_ids], 2.0)[len(prompt) - 1 :]
            assert sum((part.log_probs for part in own), ()) == pytest.approx(expected, abs=1e-4)


async def test_a_conversation_keeps_its_tokens_and_its_log_probs(policy: Running) -> None:
    """Sampled bytes rarely decode and encode back to themselves; each turn reuses what the last one computed."""
    if not policy.offers(Feature.TOKEN_IDS):
        continuation = Continuation((5, 6), True, BOARD[1:])
        return await policy.refuses(
            policy.client.generate(continuation, SamplingParams()), "continuation", Feature.TOKEN_IDS
        )
    token_ids: tuple[int, ...] = ()
    prompt: Prompt = BOARD
    log_probs: dict[int, float] = {}
    lossy = 0
    for turn in range(6):
        completion = await policy.client.generate(prompt, SamplingParams(temperature=4.0, max_tokens=6))
        assert completion.prompt_token_ids == await policy.client.tokenize(prompt)
        token_ids += completion.prompt_token_ids
        log_probs |= dict(enumerate(completion.log_probs, start=len(token_ids)))
        token_ids += completion.token_ids
        lossy += tuple(encode(completion.text)) != completion.token_ids
        closed = completion.stop_reason is StopReason.END_OF_TURN
        prompt = Continuation(token_ids, closed, (Message(Role.USER, f"A B {turn}"),))
    assert lossy > 0
    expected = plain_log_probs(reference(), token_ids, 4.0)
    for position, log_prob in log_probs.items():
        assert log_prob == pytest.approx(expected[position - 1], abs=1e-4)
    return None


async def test_prefixes_in_every_state_are_reused_without_a_trace(policy: Running) -> None:
    """Same prompt again, a longer one, a shorter one, one that leaves it halfway, and several of these at once."""
    if not policy.offers(Feature.TOKEN_IDS):
        answers = [(await policy.client.generate(TRACE, greedy())).text for _ in range(2)]
        return pytest.fail("not repeatable") if answers[0] != answers[1] else None
    base = (random_prompts(1, seed=9)[0] * 3)[:70]
    asked = [base[:60], base[:60], base, base[:20], base[:40] + [7] * 20, base[:61], base[:59], base[:60]]
    for wave in (asked, asked[::-1], asked):
        completions = await asyncio.gather(
            *(policy.client.generate(prompt, SamplingParams(max_tokens=4)) for prompt in wave)
        )
        for prompt, completion in zip(wave, completions, strict=True):
            assert agrees(prompt, completion)
    return None


async def test_every_way_to_stop(policy: Running) -> None:
    generate = policy.client.generate
    whole = await generate(TRACE, greedy())
    assert whole.stop_reason is StopReason.END_OF_TURN and len(whole.text) > 40
    few = await generate(TRACE, greedy(max_tokens=3))
    assert few.stop_reason is StopReason.MAX_TOKENS and whole.text.startswith(few.text)
    long = (Message(Role.USER, "A " * 1012),)  # and three tokens around it, in a context of 1024
    for _ in range(20):  # a random token may end the turn before the context is full
        full = await generate(long, SamplingParams(temperature=100.0, max_tokens=500))
        if full.stop_reason is not StopReason.END_OF_TURN:
            break
    assert full.stop_reason is StopReason.CONTEXT_FULL
    line = whole.text.splitlines()[1]
    stopped = await generate(TRACE, greedy(stop=("never this", line)))
    assert stopped.stop_reason is StopReason.STOP_STRING
    assert stopped.text.endswith(line) and whole.text.startswith(stopped.text)
    if not policy.offers(Feature.STOP_TOKEN_IDS):
        by_id = generate(TRACE, greedy(stop_token_ids=(9,)))
        return await policy.refuses(by_id, "sampling.stop_token_ids", Feature.STOP_TOKEN_IDS)
    assert whole.token_ids[-1] == 1 and 1 not in whole.token_ids[:-1] and len(few.token_ids) == 3
    assert len(full.token_ids) == policy.info.context_length - len(full.prompt_token_ids)
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert line not in decode(stopped.token_ids[:-1]), "it ends with the token that completes the string"
    token = whole.token_ids[10]
    ended = await generate(TRACE, greedy(stop_token_ids=(token,)))
    assert ended.stop_reason is StopReason.STOP_TOKEN
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    return None


@pytest.mark.parametrize(
    ("constraint", "feature"),
    [
        ({"regex": "(é|q)x{2,3}"}, Feature.REGEX),
        ({"json_schema": '{"enum": ["qx", "xq"]}'}, Feature.JSON_SCHEMA),
        ({"json_schema": '{"const": "é😀"}'}, Feature.JSON_SCHEMA),
    ],
    ids=["regex", "json", "characters of several tokens"],
)
async def test_a_constraint_holds_for_all_of_the_text(
    policy: Running, constraint: dict[str, Any], feature: Feature
) -> None:
    """Log-probabilities stay those of the unconstrained model. Of these texts each token is a byte."""

    def holds(text: str) -> bool:
        if feature is Feature.JSON_SCHEMA:
            return json.loads(text) in ("qx", "xq", "é😀")
        return re.fullmatch(constraint["regex"], text) is not None

    params = SamplingParams(temperature=2.0, max_tokens=60, **constraint)
    if not policy.offers(feature):
        [name] = constraint
        return await policy.refuses(policy.client.generate(BOARD, params), f"sampling.{name}", feature)
    for completion in await policy.client.sample(BOARD, params, 4):
        assert holds(completion.text), completion.text
        assert completion.stop_reason is StopReason.END_OF_TURN
        if policy.offers(Feature.LOG_PROBS):
            assert agrees(completion.prompt_token_ids, completion, 2.0)
    streamed = "".join([part.text async for part in policy.client.stream(BOARD, params)])
    # SGLang's OpenAI endpoint streams the bytes of a character one by one, with this tokenizer.
    assert holds(streamed) or ("\ufffd" in streamed and policy.name == "openai")
    return None


async def test_defaults_of_the_contract_apply(policy: Running) -> None:
    async with grpc.aio.insecure_channel(policy.address) as channel:
        stub = pb_grpc.PolicyServiceStub(channel)
        messages = pb.Messages(messages=[message_pb2.Message(role=message_pb2.ROLE_USER, content="A B")])
        texts = set()
        for _ in range(8):
            [completion] = (await stub.Generate(pb.GenerateRequest(messages=messages))).completions
            texts.add(completion.text)
        assert len(texts) > 1, "sampled at temperature 1, not greedy"
        if policy.offers(Feature.SCORE):
            scored = await stub.Score(pb.ScoreRequest(sequences=[pb.TokenIds(ids=[7, 8, 9])]))
            assert list(scored.scores[0].log_probs) == pytest.approx(plain_log_probs(reference(), [7, 8, 9]), abs=1e-4)


async def test_tokenize_says_what_generate_would_show(policy: Running) -> None:
    if not policy.offers(Feature.TOKEN_IDS):
        await policy.refuses(policy.client.tokenize("A B"), "text", Feature.TOKEN_IDS)
        return await policy.refuses(policy.client.tokenize(BOARD), "messages", Feature.TOKEN_IDS)
    assert await policy.client.tokenize("") == ()
    assert await policy.client.tokenize("A B") == tuple(encode("A B"))
    rendered = "<|system|>play<|end|><|user|>A B C\nD E F<|end|><|assistant|>"
    assert await policy.client.tokenize(BOARD) == tuple(encode(rendered))
    long = "A B C " * 8000
    assert len(await policy.client.tokenize(long)) == 24000
    assert len(await policy.client.tokenize((Message(Role.USER, long),))) > 24000
    return None


async def test_every_policy_is_listed(policy: Running) -> None:
    async with grpc.aio.insecure_channel(policy.address) as channel:
        answer: Any = await pb_grpc.PolicyServiceStub(channel).ListPolicies(pb.ListPoliciesRequest())
    assert [(one.name, one.backend) for one in answer.policies] == [(policy.info.name, policy.info.backend)]
    assert policy.info.name == "actor" and len(answer.policies[0].features) == len(policy.info.features)


TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|system|>' }}{% for tool in tools %}{{ tool['function'] | tojson }}{% endfor %}{{ '<|end|>' }}"
    "{% endif %}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("name", ["batched", "sglang"])
async def test_tools_are_shown_by_the_template(name: str, tmp_path: Path) -> None:
    """By the one that belongs to the policy's model: prompts are rendered here, whatever the engine has."""
    folder = shutil.copytree(EMBEDDED, tmp_path / EMBEDDED.name)  # SGLang serves what is called so
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    go = Tool("go", "Moves.", '{"type": "object", "properties": {"to": {"type": "string"}}}')
    turns = (
        Message(Role.USER, "A B"),
        Message(Role.ASSISTANT, "", (ToolCall("go", '{"to": "B"}'),)),
        Message(Role.TOOL, "blocked", name="go"),
    )
    shown = (
        '<|system|>{"name": "go", "description": "Moves.", "parameters": {"type": "object", "properties": {"to": '
        '{"type": "string"}}}}<|end|><|user|>A B<|end|><|assistant|><tool_call>{"name": "go", "arguments": '
        '{"to": "B"}}</tool_call><|end|><|tool|>blocked<|end|><|assistant|>'
    )
    async with running(name, model=str(folder)) as policy:
        assert policy.info.features == FEATURES[name] | {Feature.TOOLS}
        options = CallOptions(tools=(go,))
        completion = await policy.client.generate(turns, greedy(max_tokens=5), options)
        assert completion.prompt_token_ids == tuple(encode(shown))
        assert completion.prompt_token_ids == await policy.client.tokenize(turns, options)
        assert agrees(completion.prompt_token_ids, completion)
        continuation = Continuation(completion.token_ids, True, (Message(Role.TOOL, "blocked", name="go"),))
        assert await policy.client.tokenize(continuation) == tuple(encode("<|tool|>blocked<|end|><|assistant|>"))
        with pytest.raises(DomainError) as caught:
            await policy.client.generate(turns, greedy(), CallOptions(tools=(replace(go, parameters="[]"),)))
        assert caught.value.metadata["field"] == "tools[0].parameters"
