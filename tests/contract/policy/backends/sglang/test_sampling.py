"""What the sglang backend samples and scores, on a real server, against transformers in float32."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, SamplingParams, StopReason, VersionSpan
from mulligan.policy.backend import Ask
from mulligan.testing.weights import load, plain_log_probs
from tests.support.found import sglang_address
from tests.support.sglang import MODEL, PROMPT, ask, assert_by_version, opened, streamed


@pytest.fixture(scope="module")
def model() -> Any:
    return load(MODEL)


@pytest.fixture(autouse=True)
def _there_is_a_server() -> None:
    sglang_address()


async def test_log_probabilities_are_those_of_transformers_in_a_mixed_batch(tmp_path: Path, model: Any) -> None:
    """Greedy, sampled, and top-k 1 at a temperature, beside each other and alone."""
    asks = [
        ask(PROMPT[: 20 + number], temperature=temperature, top_k=top_k, top_p=top_p)
        for number, (temperature, top_k, top_p) in enumerate(
            [(0, 0, 1), (0.5, 0, 1), (1, 0, 1), (1.7, 0, 0.9), (0.7, 1, 1), (2, 1, 1), (1.3, 5, 1)] * 2
        )
    ]
    async with opened(tmp_path) as backend:
        together = await asyncio.gather(*(backend.generate(request) for request in asks))
        alone = [await backend.generate(request) for request in asks[:7]]
    for request, sampled in zip([*asks, *asks[:7]], [*together, *alone], strict=True):
        assert sampled.token_ids
        assert_by_version({0: model}, request, sampled)
    for request, one, other in zip(asks[:7], together[:7], alone, strict=True):
        if request.sampling.temperature == 0 or request.sampling.top_k == 1:
            assert one.token_ids == other.token_ids


async def test_a_stream_brings_what_the_unary_call_does(tmp_path: Path, model: Any) -> None:
    async with opened(tmp_path) as backend:
        for temperature in (0.0, 1.5):
            request = ask(temperature=temperature, stop=("zzz",))
            sampled = await streamed(backend, request)
            assert_by_version({0: model}, request, sampled)
            if temperature == 0:
                unary = await backend.generate(request)
                assert (sampled.token_ids, sampled.stop_reason) == (unary.token_ids, unary.stop_reason)
                assert sampled.log_probs == pytest.approx(unary.log_probs, abs=1e-5)


async def test_why_a_completion_ends_and_what_it_ends_with(tmp_path: Path) -> None:
    async with opened(tmp_path) as backend:
        greedy = await backend.generate(ask(temperature=0, max_tokens=200))
        [end_of_turn] = backend.model.end_of_turn_token_ids
        assert greedy.stop_reason is StopReason.END_OF_TURN and greedy.token_ids[-1] == end_of_turn
        for call in (backend.generate, lambda request: streamed(backend, request)):
            first = greedy.token_ids[:4]
            short = await call(ask(temperature=0, max_tokens=4))
            assert short.token_ids == first and short.stop_reason is StopReason.MAX_TOKENS
            at_token = await call(ask(temperature=0, stop_token_ids=(first[2],)))
            assert at_token.token_ids == greedy.token_ids[: greedy.token_ids.index(first[2]) + 1]
            assert at_token.stop_reason is StopReason.STOP_TOKEN
            text = backend.decode(first[:2])
            at_string = await call(ask(temperature=0, stop=("never", text[-2:])))
            assert at_string.token_ids == first[:2] and at_string.stop_reason is StopReason.STOP_STRING
            long = (PROMPT * 30)[: backend.model.context_length - 3]
            beyond = await call(Ask(long, SamplingParams(temperature=1.0, max_tokens=50, stop_token_ids=())))
            if beyond.stop_reason is not StopReason.END_OF_TURN:
                assert len(beyond.token_ids) == 3 and beyond.stop_reason is StopReason.CONTEXT_FULL


async def test_a_constraint_holds_and_leaves_log_probabilities_as_they_are(tmp_path: Path, model: Any) -> None:
    async with opened(tmp_path) as backend:
        assert {Feature.REGEX, Feature.JSON_SCHEMA} <= backend.model.features
        for temperature in (0.0, 0.6, 1.0):
            request = ask(temperature=temperature, regex="(up|down){3}")
            for sampled in (await backend.generate(request), await streamed(backend, request)):
                assert backend.decode(sampled.token_ids) in _words(("up", "down"), 3)
                assert_by_version({0: model}, request, sampled)
        schema = '{"type": "string", "enum": ["left", "right"]}'
        sampled = await backend.generate(ask(json_schema=schema))
        assert backend.decode(sampled.token_ids).strip() in ('"left"', '"right"')
        with pytest.raises(DomainError) as caught:
            await backend.generate(ask(regex="((("))
        assert caught.value.reason is Reason.INVALID_FIELD and "regex" in caught.value.message
        assert backend.replicas[0].info.serving


async def test_scores_are_complete_whatever_is_cached(tmp_path: Path, model: Any) -> None:
    sequences = [PROMPT, PROMPT[:7], PROMPT[:1], [*PROMPT, 7, 8, 9]]
    async with opened(tmp_path) as backend:
        for temperature in (1.0, 0.6, 1.0):
            scored = await backend.score(sequences, temperature)
            assert scored.policy_version == 0
            for ids, row in zip(sequences, scored.log_probs, strict=True):
                assert list(row) == pytest.approx(plain_log_probs(model, ids, temperature), abs=1e-4)
        again = await backend.replicas[0].score(sequences, 1.0)
        for row, other in zip(again.log_probs, scored.log_probs, strict=True):
            assert row == pytest.approx(other, abs=1e-5)


async def test_what_is_cancelled_is_aborted(tmp_path: Path) -> None:
    """Requests that would run for long are gone at once, whether they were streamed or not."""
    async with opened(tmp_path) as backend:
        endless = ask(temperature=1.0, max_tokens=900, regex="[a-z]{800}")
        calls = [asyncio.create_task(backend.generate(endless)) for _ in range(4)]
        await _until_running(lambda running: running >= 4)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await _until_running(lambda running: running == 0)
        assert [replica.info.in_flight for replica in backend.replicas] == [0]
        for _ in range(8):  # such a stream may end early by itself
            parts: Any = backend.stream(ask(temperature=50.0, max_tokens=900))
            part = await anext(parts)
            await parts.aclose()
            assert part.policy_versions[0] == VersionSpan(0, len(part.token_ids))
        await _until_running(lambda running: running == 0)


async def test_more_than_the_queue_holds_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, max_queue=2) as backend:
        results = await asyncio.gather(*(backend.generate(ask()) for _ in range(4)), return_exceptions=True)
        refused = [error.reason for error in results if isinstance(error, DomainError)]
        assert refused == [Reason.QUEUE_FULL] * 2
        await backend.generate(ask())


async def _until_running(holds: Any) -> None:
    """The scheduler's own count; it is published while it runs something, so it is given something."""
    async with asyncio.timeout(30), aiohttp.ClientSession() as session:
        while True:
            short = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
            async with session.post(f"{sglang_address()}/generate", json=short) as response:
                assert response.status == 200
            async with session.get(f"{sglang_address()}/v1/loads") as response:
                [load_now] = (await response.json())["loads"]
            if holds(load_now["num_running_reqs"] + load_now["num_waiting_reqs"]):
                return
            await asyncio.sleep(0.05)


def _words(words: tuple[str, ...], count: int) -> set[str]:
    found = {""}
    for _ in range(count):
        found = {before + word for before in found for word in words}
    return found
