"""The vllm backend on a real server, against transformers in float32.

The server that all tests share is the one at MULLIGAN_TEST_VLLM, where that is set: the model is in the folder that it
was started with. Otherwise it is started here.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, LoraLimits, SamplingParams, StopReason, WeightsKind
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backend import Ask, Sampled, WeightsFile
from mulligan.policy.backends.vllm import Settings as VllmSettings
from mulligan.testing.weights import load, plain_log_probs
from tests.support import sglang as engines
from tests.support.vllm import (
    CONTEXT_LENGTH,
    ENVIRONMENT,
    FLAGS,
    MODEL_NAME,
    START_SECONDS,
    changed,
    lora,
    opened,
    python_of_vllm,
    running,
    write_model,
)
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(2 * START_SECONDS)
PROMPT = engines.PROMPT
ask = engines.ask
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
FEATURES = frozenset(Feature) - {Feature.PRIORITY, Feature.TOOLS, Feature.MEMORY_RELEASE}


class Served:
    """A server, and the model that it was started with."""

    def __init__(self, address: str, model: Path):
        self.address = address
        self.model = model

    @property
    def settings(self) -> VllmSettings:
        return VllmSettings(servers=(self.address,), probe_seconds=0.2)

    async def call(self, path: str, body: Any = None) -> Any:
        """What somebody else does to it. Without a body it is a GET."""
        method = "GET" if body is None else "POST"
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"{self.address}{path}", json=body) as response,
        ):
            text = await response.text()
            assert response.status == 200, text
            return await response.json() if response.content_type == "application/json" else text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if address := os.environ.get("MULLIGAN_TEST_VLLM", ""):
        yield Served(address, Path(asyncio.run(Served(address, Path()).call("/v1/models"))["data"][0]["root"]))
        return
    python_of_vllm()
    folder = tmp_path_factory.mktemp("vllm")
    model = write_model(folder / MODEL_NAME)
    with running(model, folder) as address:
        yield Served(address, model)


async def test_what_it_can_do_is_known(tmp_path: Path, served: Served) -> None:
    async with opened(tmp_path, served.model, served.settings) as backend:
        assert backend.model.features == FEATURES
        assert backend.model.context_length == CONTEXT_LENGTH - 1
        assert backend.model.dtype == "float32"
        assert backend.model.lora == LoraLimits(8)


async def test_log_probabilities_are_those_of_transformers_in_a_mixed_batch(tmp_path: Path, served: Served) -> None:
    """Greedy, sampled, and of what top-p and top-k leave, beside each other and alone."""
    asks = [
        ask(PROMPT[: 20 + number], temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=12)
        for number, (temperature, top_k, top_p) in enumerate(
            [(0, 0, 1), (0, 3, 0.5), (0.5, 0, 1), (1, 0, 1), (1, 0, 0.9), (1.7, 0, 0.9), (0.7, 1, 1), (2, 5, 1)]
        )
    ]
    model = load(served.model)
    async with opened(tmp_path, served.model, served.settings) as backend:
        together = await asyncio.gather(*(backend.generate(request) for request in asks))
        alone = [await backend.generate(request) for request in asks]
    for request, sampled in zip([*asks, *asks], [*together, *alone], strict=True):
        assert sampled.token_ids
        engines.assert_by_version({0: model}, request, sampled)
    for request, one, other in zip(asks, together, alone, strict=True):
        if request.sampling.temperature == 0 or request.sampling.top_k == 1:
            assert one.token_ids == other.token_ids


async def test_a_stream_brings_what_the_unary_call_does(tmp_path: Path, served: Served) -> None:
    model = load(served.model)
    async with opened(tmp_path, served.model, served.settings) as backend:
        samplings: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 1.5, "seed": 7},
            {"top_p": 0.8, "seed": 8},
        ]
        for sampling in samplings:
            request = ask(stop=("zzz",), **sampling)
            sampled = await engines.streamed(backend, request)
            engines.assert_by_version({0: model}, request, sampled)
            unary = await backend.generate(request)
            assert (sampled.token_ids, sampled.stop_reason) == (unary.token_ids, unary.stop_reason)
            assert sampled.log_probs == pytest.approx(unary.log_probs, abs=1e-5)


async def test_why_a_completion_ends_and_what_it_ends_with(tmp_path: Path, served: Served) -> None:
    async with opened(tmp_path, served.model, served.settings) as backend:
        [end_of_turn] = backend.model.end_of_turn_token_ids
        greedy = await backend.generate(ask(temperature=0, max_tokens=8))
        turn = await backend.generate(ask(temperature=0, max_tokens=8, regex="(up|down)"))
        assert turn.stop_reason is StopReason.END_OF_TURN and turn.token_ids[-1] == end_of_turn
        for call in (backend.generate, lambda request: engines.streamed(backend, request)):
            first = greedy.token_ids[:4]
            short = await call(ask(temperature=0, max_tokens=4))
            assert short.token_ids == first and short.stop_reason is StopReason.MAX_TOKENS
            at_token = await call(ask(temperature=0, stop_token_ids=(first[2],)))
            assert at_token.token_ids == first[:3] and at_token.stop_reason is StopReason.STOP_TOKEN
            text = backend.decode(first[:2])
            at_string = await call(ask(temperature=0, stop=("never", text[-2:])))
            assert at_string.token_ids == first[:2] and at_string.stop_reason is StopReason.STOP_STRING
            long = (PROMPT * 30)[: backend.model.context_length - 3]
            beyond = await call(Ask(long, SamplingParams(temperature=1.0, max_tokens=50)))
            if beyond.stop_reason is not StopReason.END_OF_TURN:
                assert len(beyond.token_ids) == 3 and beyond.stop_reason is StopReason.CONTEXT_FULL


async def test_a_constraint_holds_and_leaves_log_probabilities_as_they_are(tmp_path: Path, served: Served) -> None:
    model = load(served.model)
    async with opened(tmp_path, served.model, served.settings) as backend:
        for temperature in (0.0, 0.6, 1.0):
            request = ask(temperature=temperature, regex="(up|down)")
            for sampled in (await backend.generate(request), await engines.streamed(backend, request)):
                assert backend.decode(sampled.token_ids) in ("up", "down")
                engines.assert_by_version({0: model}, request, sampled)
        sampled = await backend.generate(ask(json_schema='{"type": "string", "enum": ["left", "right"]}'))
        assert backend.decode(sampled.token_ids).strip() in ('"left"', '"right"')


async def test_what_vllm_does_not_take_is_said(tmp_path: Path, served: Served) -> None:
    async with opened(tmp_path, served.model, served.settings) as backend:
        for sampling, field in (({"regex": "((("}, "sampling.regex"), ({"temperature": 2.5}, "sampling")):
            for call in (backend.generate(ask(**sampling)), engines.streamed(backend, ask(**sampling))):
                with pytest.raises(DomainError) as caught:
                    await call
                assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_FIELD, field)
        with pytest.raises(DomainError) as caught:
            await backend.release_memory()
        assert caught.value.reason is Reason.UNSUPPORTED_OPTION
        assert backend.replicas[0].info.serving


async def test_scores_are_complete_whatever_is_cached(tmp_path: Path, served: Served) -> None:
    model = load(served.model)
    sequences = [PROMPT, PROMPT[:7], PROMPT[:1], [*PROMPT, 7, 8, 9], (PROMPT * 30)[: CONTEXT_LENGTH - 1]]
    async with opened(tmp_path, served.model, served.settings) as backend:
        for temperature, count in ((1.0, 5), (0.6, 4), (1.0, 5)):
            scored = await backend.score(sequences[:count], temperature)
            assert scored.policy_version == 0
            for ids, row in zip(sequences, scored.log_probs, strict=False):
                assert list(row) == pytest.approx(plain_log_probs(model, ids, temperature), abs=1e-4)


async def test_updates_under_load_are_told_apart_token_by_token(tmp_path: Path, served: Served) -> None:
    """Full weights, adapters over the original ones, full weights again, and the original ones."""
    references: dict[int, Any] = {0: load(served.model), 6: load(served.model)}
    references |= {version: changed(served.model, version) for version in (1, 2, 5)}
    references[3], first = lora(served.model, tmp_path, 3, LAYERS)
    references[4], second = lora(served.model, tmp_path, 4, ["q_proj", "v_proj"], use_rslora=True)
    updates = [
        engines.full(tmp_path, references[1], 1),
        engines.full(tmp_path, references[2], 2),
        first,
        second,
        engines.full(tmp_path, references[5], 5),
        WeightsFile(None, WeightsKind.ORIGINAL, 6, ""),
    ]
    admitted: list[tuple[str, int]] = []
    checksums = []
    async with opened(tmp_path, served.model, served.settings) as backend:
        callers = [asyncio.create_task(_call(backend, number)) for number in range(4)]
        checksums.append(await backend.replicas[0].checksum())
        for weights in updates:
            await backend.update_weights(weights, engines.admission(references, admitted))
            sampled = await backend.generate(ask())
            assert {span.policy_version for span in sampled.policy_versions} == {weights.policy_version}
            checksums.append(await backend.replicas[0].checksum())
        for caller in callers:
            caller.cancel()
        answers = [pair for caller in callers for pair in await caller]
        await until(lambda: backend.replicas[0].info.in_flight == 0)
        adapters = [card["id"] for card in (await served.call("/v1/models"))["data"] if card["parent"]]
    assert [version for _, version in admitted] == [1, 2, 3, 4, 5, 6]
    assert checksums[0] == checksums[-1] and len(set(checksums)) == len(checksums) - 1
    assert not adapters, "an adapter that nothing uses is still there"
    assert answers
    for request, sampled in answers:
        engines.assert_by_version(references, request, sampled)


async def test_a_request_under_way_goes_on_with_the_new_weights(tmp_path: Path, served: Served) -> None:
    references = {0: load(served.model), 1: changed(served.model, 1)}
    async with opened(tmp_path, served.model, served.settings) as backend:
        request = ask(temperature=2.0, max_tokens=300)
        for version in (1, 0) * 8:  # such a request may end by itself before the update
            parts = backend.stream(request)
            begun = [await anext(parts)]
            weights = _original(0) if version == 0 else engines.full(tmp_path, references[1], 1)
            await backend.update_weights(weights, engines.admission(references, []))
            begun += [part async for part in parts]
            whole = _joined(begun)
            engines.assert_by_version(references, request, whole)
            if len({span.policy_version for span in whole.policy_versions}) == 2:
                break
        else:
            raise AssertionError("every request ended before the update")
        await backend.update_weights(_original(0), engines.admission(references, []))


async def test_what_is_refused_leaves_the_old_weights(tmp_path: Path, served: Served) -> None:
    references = {0: load(served.model), 1: changed(served.model, 1), 2: changed(served.model, 2)}
    name = "model.layers.3.mlp.up_proj.weight"
    good = dict(references[2].named_parameters())[name].detach()
    key = name.replace(".", "__")
    cases = {
        "another shape": engines.full(tmp_path, references[2], 3, **{key: good[:8].clone()}),
        "a name missing": engines.full(tmp_path, references[2], 4, **{key: None}),
        "nan": engines.full(tmp_path, references[2], 5, **{key: torch.full_like(good, float("nan"))}),
        "no such rank": lora(served.model, tmp_path, 8, ["q_proj"], r=16)[1],
    }
    admitted: list[tuple[str, int]] = []
    async with opened(tmp_path, served.model, served.settings) as backend:
        await backend.update_weights(engines.full(tmp_path, references[1], 1), engines.admission(references, admitted))
        before = await backend.replicas[0].checksum()
        for case, weights in cases.items():
            with pytest.raises(DomainError) as caught:
                await backend.update_weights(weights, engines.admission(references, admitted))
            assert caught.value.reason is Reason.MODEL_MISMATCH, f"{case}: {caught.value}"
            if weights.kind is WeightsKind.LORA:
                assert "refuses it: incident " in caught.value.message, "the server's words are in the log"
            assert backend.policy_version == 1, case
            engines.assert_by_version(references, ask(), await backend.generate(ask()))
            assert await backend.replicas[0].checksum() == before, case
        assert [version for _, version in admitted] == [1]
        await backend.update_weights(_original(0), engines.admission(references, admitted))


async def test_weights_that_somebody_else_changed_are_noticed_and_put_back(tmp_path: Path, served: Served) -> None:
    references = {1: changed(served.model, 1), 2: load(served.model)}
    other = engines.full(tmp_path, references[1], 1)
    admitted: list[tuple[str, int]] = []
    async with opened(tmp_path, served.model, served.settings) as backend:
        await backend.update_weights(other, engines.admission(references, admitted))
        await served.call("/pause?mode=keep", {})
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(served.model)}}
        await served.call("/collective_rpc", reload)
        await served.call("/update_weight_version", {"new_version": "somebody's"})
        await served.call("/resume", {})
        sampled = await backend.generate(ask())
        engines.assert_by_version(references, ask(), sampled)
        await until(lambda: len(admitted) == 2, 60)
        await backend.update_weights(_original(2), engines.admission(references, admitted))


async def test_what_is_cancelled_is_aborted(tmp_path: Path, served: Served) -> None:
    async with opened(tmp_path, served.model, served.settings) as backend:
        endless = ask(max_tokens=400, regex="[a-z]{380}")
        calls = [asyncio.create_task(backend.generate(endless)) for _ in range(4)]
        await _until_running(served, lambda running: running >= 4)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await _until_running(served, lambda running: running == 0)
        parts = backend.stream(ask(temperature=2.0, max_tokens=400))
        assert isinstance(parts, AsyncGenerator)
        await anext(parts)
        await parts.aclose()
        await _until_running(served, lambda running: running == 0)
        assert [replica.info.in_flight for replica in backend.replicas] == [0]


async def test_servers_of_other_models_are_refused(tmp_path: Path, served: Served) -> None:
    other = write_model(tmp_path / "other")
    with pytest.raises(UnsupportedModel, match="other"):
        async with opened(tmp_path, other, served.settings):
            pass


async def test_a_launched_server_that_is_killed_comes_back_with_the_present_weights(tmp_path: Path) -> None:
    settings = VllmSettings(python=python_of_vllm(), flags=FLAGS, environment=ENVIRONMENT, probe_seconds=0.2)
    model = write_model(tmp_path / MODEL_NAME)
    references = {0: load(model), 1: changed(model, 1)}
    admitted: list[tuple[str, int]] = []
    async with opened(tmp_path, model, settings, adapters={}) as backend:
        engines.assert_by_version(references, ask(), await backend.generate(ask()))
        await backend.update_weights(engines.full(tmp_path, references[1], 1), engines.admission(references, admitted))
        before = await backend.replicas[0].checksum()
        os.kill(_process(backend.replicas[0].info.address), signal.SIGKILL)
        await until(lambda: not backend.replicas[0].info.serving)
        await until(lambda: backend.replicas[0].info.serving, START_SECONDS)
        assert await backend.replicas[0].checksum() == before
        engines.assert_by_version(references, ask(), await backend.generate(ask()))
        assert [version for _, version in admitted] == [1, 1]


async def _call(backend: Any, number: int) -> list[tuple[Ask, Any]]:
    """Asks until it is cancelled, some as streams; returns what was asked and answered."""
    answers: list[tuple[Ask, Any]] = []
    try:
        while True:
            request = ask(list(range(20, 40 + number + len(answers) % 5)), temperature=1.9, max_tokens=30)
            call = engines.streamed(backend, request) if number % 3 == 0 else backend.generate(request)
            answers.append((request, await call))
    except asyncio.CancelledError:
        return answers


async def _until_running(served: Served, holds: Any) -> None:
    """The scheduler's own count."""
    async with asyncio.timeout(120):
        while True:
            metrics = await served.call("/metrics")
            lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")]
            if holds(sum(float(line.rpartition(" ")[2]) for line in lines)):
                return
            await asyncio.sleep(0.05)


def _joined(parts: list[Sampled]) -> Sampled:
    return Sampled(
        tuple(token for part in parts for token in part.token_ids),
        tuple(value for part in parts for value in part.log_probs),
        parts[-1].stop_reason,
        tuple(span for part in parts for span in part.policy_versions),
    )


def _original(version: int) -> WeightsFile:
    return WeightsFile(None, WeightsKind.ORIGINAL, version, "")


def _process(address: str) -> int:
    """Of the server that was told to listen there, the first of its group."""
    port = address.rpartition(":")[2].encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it ended
                continue
            pid = int(folder.name)
            if b"vllm.entrypoints.openai.api_server" in arguments and port in arguments and os.getsid(pid) == pid:
                return pid
    raise AssertionError(f"no process listens at {address}")
