"""What a policy with any backend must do, over gRPC. A new backend is added to BACKENDS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc

from models.build import write_untrained
from services.common.errors import DomainError, Reason, ServiceUnavailable
from services.common.types import (
    Continuation,
    Message,
    Prompt,
    PublishedWeights,
    Role,
    SamplingParams,
    StopReason,
    VersionSpan,
    WeightsKind,
)
from tests.support.policy import Serving, load, plain_log_probs, serving

BACKENDS: dict[str, dict[str, Any]] = {"batched": {}, "deterministic": {"deterministic": True}}
CONTEXT = 128
BOARD = (Message(Role.SYSTEM, "play"), Message(Role.USER, "A B C\nD E F"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    return load(model)


@pytest.fixture(params=list(BACKENDS))
async def policy(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> AsyncIterator[Serving]:
    settings = BACKENDS[request.param]
    async with serving(model, context_length=CONTEXT, weights_folder=tmp_path, **settings) as running:
        yield running


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 319, int(length)).tolist() for length in rng.integers(1, 60, count)]


async def test_it_describes_itself(policy: Serving, model: Path) -> None:
    info = await policy.client.info()
    assert (info.model, info.policy_version, info.context_length, info.vocabulary_size) == (str(model), 0, CONTEXT, 319)
    assert info.end_of_turn_token_ids == (1,) and not info.rewrites_history
    assert info == policy.backend.info


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.3])
async def test_log_probs_are_those_of_a_plain_forward_pass(policy: Serving, reference: Any, temperature: float) -> None:
    """Also with top-p and top-k, which log-probabilities ignore; greedy takes the likeliest token each time."""
    params = SamplingParams(temperature=temperature, top_p=0.9, top_k=50, max_tokens=12)
    asked = random_prompts(12)
    completions = await asyncio.gather(*(policy.client.generate(prompt, params) for prompt in asked))
    for prompt, completion in zip(asked, completions, strict=True):
        expected = plain_log_probs(reference, [*prompt, *completion.token_ids], temperature or 1.0)
        assert completion.log_probs == pytest.approx(expected[len(prompt) - 1 :], abs=1e-4)
        assert completion.prompt_token_ids == () and completion.policy_versions[0].policy_version == 0
        if temperature == 0:
            chosen = reference.generate(
                _tensor(prompt),
                do_sample=False,
                max_new_tokens=12,
                pad_token_id=0,
                attention_mask=_tensor(prompt) * 0 + 1,
            )
            assert list(completion.token_ids) == chosen[0, len(prompt) :].tolist()


def _tensor(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])


async def test_score_is_a_plain_forward_pass_at_a_temperature(policy: Serving, reference: Any) -> None:
    sequences = [*random_prompts(7, seed=3), list(range(5, 5 + CONTEXT))]
    scores, version = await policy.client.score(sequences, 0.7)
    assert version == 0 and [len(row) for row in scores] == [len(sequence) - 1 for sequence in sequences]
    for sequence, row in zip(sequences, scores, strict=True):
        assert row == pytest.approx(plain_log_probs(reference, sequence, 0.7) if len(sequence) > 1 else (), abs=1e-4)


async def test_a_seed_repeats_whatever_else_is_in_the_batch(policy: Serving) -> None:
    asked = random_prompts(16, seed=1)
    params = [SamplingParams(temperature=1.0, max_tokens=8, seed=index) for index in range(16)]
    alone = [await policy.client.generate(prompt, param) for prompt, param in zip(asked, params, strict=True)]
    together = await asyncio.gather(
        *(policy.client.generate(prompt, param) for prompt, param in zip(asked, params, strict=True))
    )
    assert [completion.token_ids for completion in alone] == [completion.token_ids for completion in together]
    if policy.backend.info.deterministic:
        assert alone == together
    other = await policy.client.generate(asked[0], replace(params[0], seed=99))
    unseeded = {(await policy.client.generate(asked[0], replace(params[0], seed=None))).token_ids for _ in range(3)}
    assert other.token_ids != alone[0].token_ids and len(unseeded) == 3


async def test_a_conversation_keeps_its_tokens_and_its_log_probs(policy: Serving, reference: Any) -> None:
    """Sampled bytes rarely decode and encode back to themselves; each turn reuses what the last one computed."""
    token_ids: tuple[int, ...] = ()
    prompt: Prompt = BOARD
    log_probs: dict[int, float] = {}
    lossy = 0
    for turn in range(5):
        completion = await policy.client.generate(prompt, SamplingParams(max_tokens=6, seed=turn))
        assert completion.prompt_token_ids == await policy.client.tokenize(prompt)
        token_ids += completion.prompt_token_ids
        log_probs |= dict(enumerate(completion.log_probs, start=len(token_ids)))
        token_ids += completion.token_ids
        lossy += tuple(policy.backend.encode(completion.text)) != completion.token_ids
        closed = completion.stop_reason is StopReason.END_OF_TURN
        prompt = Continuation(token_ids, closed, (Message(Role.USER, f"A B {turn}"),))
    assert lossy > 0
    expected = plain_log_probs(reference, token_ids)
    for position, log_prob in log_probs.items():
        assert log_prob == pytest.approx(expected[position - 1], abs=1e-4)


async def test_prefixes_in_every_state_are_reused_without_a_trace(policy: Serving, reference: Any) -> None:
    """Same prompt again, a longer one, a shorter one, one that leaves it halfway, and several of these at once."""
    base = random_prompts(1, seed=9)[0] * 3
    asked = [base[:60], base[:60], base[:70], base[:20], base[:40] + [7] * 20, base[:61], base[:59], base[:60]]
    for wave in (asked, asked[::-1], asked):
        completions = await asyncio.gather(
            *(policy.client.generate(prompt, SamplingParams(max_tokens=4)) for prompt in wave)
        )
        for prompt, completion in zip(wave, completions, strict=True):
            expected = plain_log_probs(reference, [*prompt, *completion.token_ids])[len(prompt) - 1 :]
            assert completion.log_probs == pytest.approx(expected, abs=1e-4)


async def test_every_way_to_stop(policy: Serving) -> None:
    generate = policy.client.generate
    prompt = random_prompts(1)[0][:20]
    one = await generate(prompt, SamplingParams(max_tokens=1))
    assert one.stop_reason is StopReason.MAX_TOKENS and len(one.token_ids) == len(one.log_probs) == 1
    full = await generate([5] * (CONTEXT - 3), SamplingParams(max_tokens=99, seed=3))
    assert full.stop_reason is StopReason.CONTEXT_FULL and len(full.token_ids) == 3
    closed = await generate(prompt, SamplingParams(max_tokens=40, seed=21))  # a seed that ends its turn early…
    assert closed.stop_reason is StopReason.END_OF_TURN
    assert closed.token_ids[-1] == 1 and 1 not in closed.token_ids[:-1]
    words = await generate(prompt, SamplingParams(max_tokens=40, seed=3))  # … and one that samples two letters first
    assert words.stop_reason is StopReason.MAX_TOKENS and 1 not in words.token_ids
    for index in [index for index, token in enumerate(words.token_ids) if 7 <= token <= 32][:2]:
        stop = policy.backend.decode([words.token_ids[index]])
        stopped = await generate(prompt, SamplingParams(max_tokens=40, seed=3, stop=("never this", stop)))
        assert stopped.stop_reason is StopReason.STOP_STRING and stop in stopped.text
        assert stopped.token_ids == words.token_ids[: index + 1]


async def test_defaults_of_the_contract_apply(policy: Serving) -> None:
    import grpc

    async with grpc.aio.insecure_channel(policy.address) as channel:
        stub = pb_grpc.PolicyServiceStub(channel)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * 20))
        response = await stub.Generate(request)
        assert len(set(response.token_ids)) > 5 or len(response.token_ids) < 20  # sampled at temperature 1, not greedy
        scored = await stub.Score(pb.ScoreRequest(sequences=[pb.TokenIds(ids=[7, 8, 9])]))
        assert len(scored.scores[0].log_probs) == 2


async def test_tokenize_encodes_text_without_template(policy: Serving) -> None:
    assert await policy.client.tokenize("") == ()
    assert await policy.client.tokenize("A B") == tuple(policy.backend.encode("A B"))
    long = "A B C " * 8000
    assert len(await policy.client.tokenize(long)) == 24000
    assert len(await policy.client.tokenize((Message(Role.USER, long),))) > 24000


def _messages(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(Role.USER, text) for text in texts)


BAD_CALLS: dict[str, tuple[Callable[[Serving], Any], Reason]] = {
    "empty prompt": (lambda p: p.client.generate([], SamplingParams()), Reason.EMPTY_PROMPT),
    "no messages": (lambda p: p.client.generate((), SamplingParams()), Reason.EMPTY_PROMPT),
    "nothing to continue": (
        lambda p: p.client.generate(Continuation((), True, BOARD[1:]), SamplingParams()),
        Reason.EMPTY_PROMPT,
    ),
    "nothing said since": (
        lambda p: p.client.generate(Continuation((5,), True, ()), SamplingParams()),
        Reason.EMPTY_PROMPT,
    ),
    "id too high": (lambda p: p.client.generate([5, 319], SamplingParams()), Reason.TOKEN_OUT_OF_VOCABULARY),
    "id far too high": (lambda p: p.client.generate([2**31 - 1], SamplingParams()), Reason.TOKEN_OUT_OF_VOCABULARY),
    "negative id": (lambda p: p.client.generate([-1], SamplingParams()), Reason.TOKEN_OUT_OF_VOCABULARY),
    "bad id in a continuation": (
        lambda p: p.client.generate(Continuation((-5,), True, BOARD[1:]), SamplingParams()),
        Reason.TOKEN_OUT_OF_VOCABULARY,
    ),
    "prompt fills the context": (lambda p: p.client.generate([5] * CONTEXT, SamplingParams()), Reason.PROMPT_TOO_LONG),
    "messages too long": (
        lambda p: p.client.generate(_messages("A " * 30000), SamplingParams()),
        Reason.PROMPT_TOO_LONG,
    ),
    "negative temperature": (
        lambda p: p.client.generate([5], SamplingParams(temperature=-1)),
        Reason.INVALID_FIELD,
    ),
    "tiny temperature": (lambda p: p.client.generate([5], SamplingParams(temperature=1e-9)), Reason.INVALID_FIELD),
    "temperature nan": (
        lambda p: p.client.generate([5], SamplingParams(temperature=float("nan"))),
        Reason.INVALID_FIELD,
    ),
    "top_p 0": (lambda p: p.client.generate([5], SamplingParams(top_p=0)), Reason.INVALID_FIELD),
    "top_k -1": (lambda p: p.client.generate([5], SamplingParams(top_k=-1)), Reason.INVALID_FIELD),
    "no tokens wanted": (lambda p: p.client.generate([5], SamplingParams(max_tokens=0)), Reason.INVALID_FIELD),
    "empty stop string": (lambda p: p.client.generate([5], SamplingParams(stop=("",))), Reason.INVALID_FIELD),
    "surrogates": (lambda p: p.client.generate(_messages("\ud800"), SamplingParams()), Reason.INVALID_FIELD),
    "version not yet served": (
        lambda p: p.client.generate([5], SamplingParams(), min_policy_version=1),
        Reason.POLICY_VERSION_TOO_OLD,
    ),
    "score nothing": (lambda p: p.client.score([], 1.0), Reason.INVALID_FIELD),
    "score an empty sequence": (lambda p: p.client.score([[5, 6], []], 1.0), Reason.EMPTY_PROMPT),
    "score beyond the context": (lambda p: p.client.score([[5] * (CONTEXT + 1)], 1.0), Reason.PROMPT_TOO_LONG),
    "score an unknown id": (lambda p: p.client.score([[5, 400]], 1.0), Reason.TOKEN_OUT_OF_VOCABULARY),
    "score greedily": (lambda p: p.client.score([[5, 6]], 0.0), Reason.INVALID_FIELD),
    "score a later version": (
        lambda p: p.client.score([[5, 6]], 1.0, min_policy_version=3),
        Reason.POLICY_VERSION_TOO_OLD,
    ),
    "weights of nowhere": (
        lambda p: p.client.update_weights(PublishedWeights(1, WeightsKind.FULL, "file:///etc/passwd", "0" * 64, "x")),
        Reason.MODEL_MISMATCH,
    ),
}


async def test_bad_calls_say_what_is_wrong_and_the_service_serves_on(policy: Serving) -> None:
    params = SamplingParams(max_tokens=3, seed=4)
    before = await policy.client.generate(BOARD, params)
    for name, (call, reason) in BAD_CALLS.items():
        with pytest.raises(DomainError) as caught:
            await call(policy)
        assert caught.value.reason is reason, f"{name}: {caught.value}"
        after = await policy.client.generate(BOARD, params)
        assert (after.token_ids, after.text) == (before.token_ids, before.text), name


async def test_a_request_without_a_prompt_is_refused(policy: Serving) -> None:
    import grpc

    async with grpc.aio.insecure_channel(policy.address) as channel:
        for call in (pb_grpc.PolicyServiceStub(channel).Generate, pb_grpc.PolicyServiceStub(channel).Tokenize):
            request = pb.GenerateRequest() if "Generate" in repr(call) else pb.TokenizeRequest()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request)  # type: ignore[operator]
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("deterministic", [False, True])
async def test_cancelled_calls_make_room_and_a_full_queue_says_so(model: Path, deterministic: bool) -> None:
    long = SamplingParams(max_tokens=900, seed=0)  # this seed does not end its turn early
    async with serving(model, max_batch=1, max_queue=1, deterministic=deterministic) as policy:
        calls = [asyncio.create_task(policy.client.generate([5] * 20, long)) for _ in range(2)]
        await asyncio.sleep(0.2)
        with pytest.raises(ServiceUnavailable, match="QUEUE_FULL"):
            await policy.client.generate([5], SamplingParams(max_tokens=1))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await _until(lambda: policy.backend.pending == 0)
        again = await asyncio.wait_for(policy.client.generate([5], SamplingParams(max_tokens=1)), 10)
        assert len(again.token_ids) == 1


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the condition belongs to the server
            await asyncio.sleep(0.01)


async def test_more_callers_than_slots_are_all_served(model: Path, reference: Any) -> None:
    asked = random_prompts(30, seed=5)
    settings: dict[str, Any] = {"slots": 4, "context_length": CONTEXT, "tokens_per_pass": 16}
    async with serving(model, **settings) as policy:
        params = SamplingParams(max_tokens=5)
        completions = await asyncio.gather(*(policy.client.generate(prompt, params) for prompt in asked))
    for prompt, completion in zip(asked, completions, strict=True):
        expected = plain_log_probs(reference, [*prompt, *completion.token_ids])[len(prompt) - 1 :]
        assert completion.log_probs == pytest.approx(expected, abs=1e-4)
        assert completion.policy_versions == (VersionSpan(0, len(completion.token_ids)),)
