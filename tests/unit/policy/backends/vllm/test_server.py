"""What the backend makes of a vLLM server. The answers are those of a real one, vLLM 0.32.0 on a CPU; they were
recorded, and shortened to what matters."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from mulligan.common.errors import Code, DomainError, Reason
from mulligan.common.inference import Feature, LoraLimits, SamplingParams, WeightsKind
from mulligan.common.model_files import UnsupportedModel
from mulligan.models import EMBEDDED
from mulligan.policy.backend import Ask, Replica, Sampled, WeightsFile
from mulligan.policy.backends._servers.answers import Aborted, BadAnswer
from mulligan.policy.backends._servers.connection import RequestRefused, Unreachable, new_session
from mulligan.policy.backends._servers.folders import TargetWeights
from mulligan.policy.backends._servers.launch import LaunchedServer
from mulligan.policy.backends._servers.server import Unsuitable
from mulligan.policy.backends._servers.skeleton import Skeleton
from mulligan.policy.backends.vllm import Settings as VllmSettings
from mulligan.policy.backends.vllm import open as open_backend
from mulligan.policy.backends.vllm import requests
from mulligan.policy.backends.vllm.backend import VllmBackend
from mulligan.policy.backends.vllm.connection import VllmConnection
from mulligan.policy.backends.vllm.server import VllmServer
from tests.support.policy import serving
from tests.support.settings import model_settings
from tests.support.sglang import lora
from tests.support.waiting import until

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded.json").read_text())


def body_of(name: str) -> bytes:
    return json.dumps(RECORDED[name]).encode()


def sent(**sampling: Any) -> dict[str, Any]:
    ask = Ask([5, 6, 7], SamplingParams(**sampling), priority=3)
    found: dict[str, Any] = json.loads(requests.encode(ask, "adapter", 20, (1,), stream=False, priority=True))
    return found


def events() -> list[requests.VllmAnswer]:
    found = [part.removeprefix("data: ") for part in RECORDED["stream"].split("\n\n") if part]
    assert found[-1] == "[DONE]"
    return [requests.decode(part.encode()) for part in found[:-1]]


class Replaying:
    """Answers as the recorded server did, and notes what it was asked. It takes no constraint, as if each were bad, and
    no temperature above 2."""

    def __init__(self, recorded: dict[str, Any]):
        self.asked: list[tuple[str, Any]] = []
        self.recorded = recorded
        self.label = "default"
        self.may_load = asyncio.Event()  # while it is clear, weights are being loaded
        self.may_load.set()
        self.runs = asyncio.Event()  # while it is clear, nothing is sampled
        self.runs.set()
        self.in_flight: list[int] = [0]  # requests, after each that came or was answered

    async def answer(self, request: web.Request) -> web.Response:
        body: Any = await request.json() if request.can_read_body else None
        self.asked.append((request.path_qs, body))
        recorded = self.recorded
        if request.path == "/inference/v1/generate":
            return await self.sampled(body)
        if request.path == "/pause":
            self.runs.clear()
        if request.path == "/collective_rpc":
            await self.may_load.wait()
        if request.path == "/update_weight_version":
            self.label = body["new_version"]
        if request.path == "/resume":
            self.runs.set()
        found = {
            "/openapi.json": {"paths": {path: {} for path in recorded["paths"]}},
            "/server_info": recorded["server_info"],
            "/v1/models": recorded["models"],
            "/weight_info": recorded["weight_info"],
            "/weight_checker": recorded["checksum"],
        }
        if request.path == "/v1/load_lora_adapter":
            return web.json_response(recorded["rank"]["body"], status=recorded["rank"]["status"])
        return web.json_response(found.get(request.path, {}))

    async def sampled(self, body: Any) -> web.Response:
        params = body["sampling_params"]
        if "structured_outputs" in params or params.get("temperature", 1.0) > 2:
            refusal = self.recorded["bad_regex" if "structured_outputs" in params else "too_hot"]
            return web.json_response(refusal["body"], status=refusal["status"])
        self.in_flight.append(self.in_flight[-1] + 1)
        await self.runs.wait()
        self.in_flight.append(self.in_flight[-1] - 1)
        if body.get("stream"):
            return web.Response(text=self.recorded["stream"].replace('"default"', f'"{self.label}"'))
        forced = "logprob_token_ids" in params
        return web.json_response(self.recorded["forced" if forced else "score"])


@asynccontextmanager
async def at_an_address(**changes: Any) -> AsyncIterator[tuple[str, Replaying]]:
    replaying = Replaying(copy.deepcopy(RECORDED) | changes)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", replaying.answer)
    async with TestServer(app) as running:
        yield str(running.make_url("/")), replaying


@asynccontextmanager
async def replaying(**changes: Any) -> AsyncIterator[tuple[VllmServer, Replaying]]:
    session = new_session()
    async with at_an_address(**changes) as (address, replaying):
        yield VllmServer(VllmConnection(session, address), 5.0, {}), replaying
        await session.close()


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    found = Skeleton(str(EMBEDDED))
    found.source = "/elsewhere/long-heads"
    return found


def test_options_go_by_the_names_that_vllm_has() -> None:
    request = sent(temperature=0.5, top_p=0.9, top_k=4, max_tokens=5, stop=("x",), stop_token_ids=(9,), seed=-3)
    assert request["token_ids"] == [5, 6, 7] and request["model"] == "adapter" and request["priority"] == -3
    assert request["sampling_params"] == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "max_tokens": 5,
        "logprobs": 0,
        "seed": -3,
        "stop": ["x"],
        "stop_token_ids": [1, 9],
    }
    assert sent(max_tokens=100)["sampling_params"]["max_tokens"] == 17  # the context has no room for more
    assert sent(regex="a+")["sampling_params"]["structured_outputs"] == {"regex": "a+"}
    assert sent(json_schema="{}")["sampling_params"]["structured_outputs"] == {"json": "{}"}


def test_what_is_scored_anew() -> None:
    def anew(**sampling: Any) -> bool:
        return requests.is_renormalised(Ask([1], SamplingParams(**sampling)))

    assert anew(top_p=0.9) and anew(top_k=3) and anew(regex="a") and anew(temperature=0.0, json_schema="{}")
    assert not anew(temperature=0.7) and not anew(temperature=0.0, top_p=0.5, top_k=3)


def test_an_answer_has_token_ids_log_probabilities_and_weights() -> None:
    answer = requests.decode(body_of("generate"))
    ids = answer.choice.token_ids
    assert len(ids) == 3 and answer.finished and answer.choice.finish_reason == "length"
    assert len(answer.log_probs) == 3 and all(value is not None and value < 0 for value in answer.log_probs)
    assert answer.labels(0, 3) == [("default", 3)] and answer.labels(1, 3) == [("default", 2)]
    stopped = requests.decode(body_of("stop_token")).choice
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (ids[:2], "stop", ids[1])


def test_a_stream_names_its_weights_at_the_end() -> None:
    whole = requests.decode(body_of("generate"))
    reader = requests.VllmStream("default")
    parts = [reader.read(event, changed=False) for event in events()]
    assert parts == [
        ([token], (value,), [("default", 1)])
        for token, value in zip(whole.choice.token_ids, whole.log_probs, strict=True)
    ]


def test_tokens_are_kept_back_while_nobody_knows_whose_they_are() -> None:
    first, second, last = events()
    reader = requests.VllmStream("default")
    assert reader.read(first, changed=False) is not None
    assert reader.read(second, changed=True) is None
    found = reader.read(last, changed=False)
    assert found is not None and found[0] == [*second.choice.token_ids, *last.choice.token_ids]
    assert found[2] == [("default", 2)]
    reader = requests.VllmStream("another")
    reader.read(first, changed=False)
    with pytest.raises(BadAnswer):
        reader.read(last, changed=False)


def test_scores_are_of_the_prompts_own_tokens() -> None:
    answer = requests.decode(body_of("score"))
    row = requests.decode_score(answer, [20, 21, 22], 1)
    assert len(row) == 2 and all(value < 0 for value in row)
    assert requests.decode_score(answer, [20, 21, 22], 2) == row[1:]
    for ids in ([20, 21], [20, 99, 22]):
        with pytest.raises(BadAnswer):
            requests.decode_score(answer, ids, 1)
    forced = requests.decode(body_of("forced"))
    assert requests.decode_forced(forced, 77) < 0
    with pytest.raises(BadAnswer):
        requests.decode_forced(forced, 78)


def test_what_vllm_sends_for_nan_is_none() -> None:
    found = copy.deepcopy(RECORDED["score"])
    found["prompt_logprobs"][1]["21"]["logprob"] = -9999.0
    assert math.isnan(requests.decode_score(requests.decode(json.dumps(found).encode()), [20, 21, 22], 1)[0])
    found = copy.deepcopy(RECORDED["generate"])
    found["choices"][0]["logprobs"]["content"][0]["logprob"] = -9999.0
    assert requests.decode(json.dumps(found).encode()).log_probs[0] is None


def test_what_is_no_answer() -> None:
    refused = RECORDED["stream_refused"].split("\n\n")[0].removeprefix("data: ").encode()
    with pytest.raises(RequestRefused, match=r"refuses it: incident \w{8}"):
        requests.decode(refused)
    with pytest.raises(Unreachable):
        requests.decode(b'{"error": {"message": "dead", "code": 500}}')
    with pytest.raises(BadAnswer):
        requests.decode(b"<html>")
    with pytest.raises(BadAnswer):
        requests.decode(b'{"choices": []}')
    with pytest.raises(Aborted):
        requests.decode(b'{"choices": [{"token_ids": [], "finish_reason": "abort"}]}')
    with pytest.raises(BadAnswer, match=r"0\.32"):
        requests.decode(b'{"choices": [{"token_ids": [3], "finish_reason": "stop"}]}').labels(0, 1)


async def test_what_a_server_can_do_is_read_from_it(skeleton: Skeleton) -> None:
    async with replaying() as (server, _):
        await server.look(skeleton)
        unknown = {Feature.PRIORITY, Feature.TOOLS, Feature.MEMORY_RELEASE}
        assert server.features == frozenset(Feature) - unknown
        assert server.context_length == 511 and server.dtype(skeleton) == "float32"
        assert server.lora == LoraLimits(8) and server.own_path == "/models/long-heads"
    changed = copy.deepcopy(RECORDED["server_info"])
    changed["vllm_config"] |= {"scheduler_config": {"policy": "priority"}, "lora_config": None}
    async with replaying(server_info=changed) as (server, _):
        await server.look(skeleton)
        assert server.features == frozenset(Feature) - {Feature.LORA_WEIGHTS, Feature.TOOLS, Feature.MEMORY_RELEASE}


async def test_servers_that_lack_something_are_refused_and_told_what(skeleton: Skeleton) -> None:
    paths = RECORDED["paths"]
    raw = copy.deepcopy(RECORDED["server_info"])
    raw["vllm_config"]["model_config"]["logprobs_mode"] = "raw_logprobs"
    other = copy.deepcopy(RECORDED["models"])
    other["data"][0]["root"] = "/models/other"
    words_only = {"vllm_config": "model='/models/long-heads', ..."}  # of one that knows no config_format
    cases: dict[str, dict[str, Any]] = {
        r"vLLM 0\.32 or later": {"server_info": words_only},
        "--enable-scale-out": {"paths": [path for path in paths if path != "/inference/v1/generate"]},
        "VLLM_SERVER_DEV_MODE": {"paths": [path for path in paths if path != "/collective_rpc"]},
        "--logprobs-mode processed_logprobs": {"server_info": raw},
        "/models/other": {"models": other},
    }
    for words, changes in cases.items():
        async with replaying(**changes) as (server, _):
            with pytest.raises(Unsuitable, match=words):
                await server.look(skeleton)


async def test_what_adapters_need_is_told(tmp_path: Path) -> None:
    models = copy.deepcopy(RECORDED["models"])
    models["data"][0]["root"] = str(EMBEDDED)
    paths = [path for path in RECORDED["paths"] if path != "/v1/load_lora_adapter"]
    _, adapter = lora(tmp_path, 1, ["q_proj"])
    async with at_an_address(models=models, paths=paths) as (address, _):
        settings = VllmSettings(servers=(address,))
        chosen = model_settings(backend="vllm", model=str(EMBEDDED), vllm=settings, adapters={"a": str(adapter.path)})
        with pytest.raises(UnsupportedModel, match=r"--enable-lora.* VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            await open_backend(chosen, tmp_path / "engine", 0)


async def test_weights_are_loaded_while_nothing_runs_and_then_named(skeleton: Skeleton) -> None:
    target = TargetWeights(WeightsFile(None, WeightsKind.FULL, 3, "ab"), "3-ab", path="/shared/3")
    async with replaying() as (server, seen):
        await server.look(skeleton)
        before = len(seen.asked)
        await server.pause()
        await server.load_base(target)
        await server.go_on()
        assert [path for path, _ in seen.asked[before:]] == [
            "/pause?mode=keep",
            "/reset_prefix_cache?reset_running_requests=true",
            "/collective_rpc",
            "/update_weight_version",
            "/resume",
        ]
        assert seen.asked[-3][1]["kwargs"] == {"weights_path": "/shared/3"}
        assert seen.asked[-2][1] == {"new_version": "3-ab"}
        assert (server.label, server.path) == ("3-ab", "/shared/3")
        with pytest.raises(Unsuitable, match="'default' instead of '3-ab'"):
            await server.probe()
        checksum = await server.checksum()
        assert len(checksum) == 64
        with pytest.raises(RequestRefused, match=r"refuses it: incident \w{8}"):
            await server.load_adapters(TargetWeights(target.weights, "3-ab", adapter="c", adapter_path="/shared/c"))


async def test_a_guest_changes_no_weights(tmp_path: Path) -> None:
    models = copy.deepcopy(RECORDED["models"])
    models["data"][0]["root"] = str(EMBEDDED)
    async with at_an_address(models=models) as (address, seen):
        settings = VllmSettings(servers=(address,), adapters_only=True)
        backend = await open_backend(model_settings(backend="vllm", model=str(EMBEDDED), vllm=settings), tmp_path, 0)
        assert isinstance(backend, VllmBackend)
        assert not {Feature.FULL_WEIGHTS, Feature.MEMORY_RELEASE} & backend.model.features
        assert not backend._can_stream(Ask([1], SamplingParams())), "it is not told of the other policy's updates"
        await backend.close()
        asked = {path.partition("?")[0] for path, _ in seen.asked}
        assert not asked & {"/pause", "/collective_rpc", "/update_weight_version", "/resume"}


async def test_a_prompt_is_scored_at_once_only_without_lora(skeleton: Skeleton) -> None:
    plain = copy.deepcopy(RECORDED["server_info"])
    plain["vllm_config"]["lora_config"] = None
    async with replaying(server_info=plain) as (server, seen):
        await server.look(skeleton)
        labels, row = await server.score_one([20, 21, 22], 1, 1.0, "")
        assert labels == {"default"} and len(row) == 2
        assert "prompt_logprobs" in seen.asked[-1][1]["sampling_params"]
    async with replaying() as (server, seen):
        await server.look(skeleton)
        labels, row = await server.score_one([20, 77, 77], 1, 1.0, "")
        assert labels == {"default"} and len(row) == 2
        assert [body["token_ids"] for _, body in seen.asked[-2:]] == [[20], [20, 77]]


async def test_scoring_token_by_token_leaves_room_for_others(skeleton: Skeleton) -> None:
    sequences = [[20] + [77] * 39] * 2
    async with replaying() as (server, seen):
        await server.look(skeleton)
        seen.runs.clear()
        scoring = asyncio.gather(*(server.score_one(ids, 1, 0.5, "") for ids in sequences))
        await until(lambda: seen.in_flight[-1] >= 32)
        seen.runs.set()
        assert [len(row) for _, row in await scoring] == [39, 39]
        assert max(seen.in_flight) == 32


async def test_a_stream_that_waited_for_new_weights_tells_theirs(tmp_path: Path) -> None:
    models = copy.deepcopy(RECORDED["models"])
    models["data"][0]["root"] = str(EMBEDDED)

    async def admit(replica: Replica, weights: WeightsFile) -> None:
        return None

    async with at_an_address(models=models) as (address, seen):
        settings = VllmSettings(servers=(address,), probe_seconds=60)
        chosen = model_settings(backend="vllm", model=str(EMBEDDED), vllm=settings)
        backend = await open_backend(chosen, tmp_path / "engine", 0)
        seen.may_load.clear()
        new = WeightsFile(None, WeightsKind.ORIGINAL, 1, "")
        updating = asyncio.create_task(backend.update_weights(new, admit))
        await until(lambda: not seen.runs.is_set())
        stream = asyncio.create_task(_all(backend.stream(Ask([20], SamplingParams(max_tokens=3)))))
        await until(lambda: seen.in_flight[-1] == 1)
        seen.may_load.set()
        await updating
        spans = [span for part in await stream for span in part.policy_versions]
        assert sum(span.token_count for span in spans) == 3
        assert {span.policy_version for span in spans} == {1}
        await backend.close()


async def test_a_server_that_comes_back_during_an_update_is_given_the_new_weights_alone(tmp_path: Path) -> None:
    models = copy.deepcopy(RECORDED["models"])
    models["data"][0]["root"] = str(EMBEDDED)

    async def admit(replica: Replica, weights: WeightsFile) -> None:
        return None

    async with at_an_address(models=models) as (first, updated), at_an_address(models=models) as (second, restored):
        settings = VllmSettings(servers=(first, second), probe_seconds=60)
        chosen = model_settings(backend="vllm", model=str(EMBEDDED), vllm=settings)
        backend = await open_backend(chosen, tmp_path / "engine", 0)
        assert isinstance(backend, VllmBackend)
        updated.may_load.clear()
        new = WeightsFile(None, WeightsKind.ORIGINAL, 1, "")
        updating = asyncio.create_task(backend.update_weights(new, admit))
        await until(lambda: not updated.runs.is_set() and restored.label == "1-original")
        seen = len(restored.asked)
        backend.pool.take_out(backend.pool.servers[1], "it was away")
        await until(lambda: "/v1/models" in [path for path, _ in restored.asked[seen:]])
        updated.may_load.set()
        await updating
        await until(lambda: all(server.serving for server in backend.pool.servers))
        names = [body["new_version"] for path, body in restored.asked[seen:] if path == "/update_weight_version"]
        assert names == ["1-original-unchecked", "1-original"]
        await backend.close()


async def test_what_the_server_refuses_is_a_field_of_the_callers_request() -> None:
    """Of a regular expression the policy itself knows nothing. The server goes on serving."""
    models = copy.deepcopy(RECORDED["models"])
    models["data"][0]["root"] = str(EMBEDDED)
    async with (
        at_an_address(models=models) as (address, seen),
        serving(EMBEDDED, backend="vllm", vllm={"servers": (address,)}) as served,
    ):
        for sampling, field in (
            (SamplingParams(regex="((("), "sampling.regex"),
            (SamplingParams(json_schema='{"type": "banana"}'), "sampling.json_schema"),
            (SamplingParams(temperature=2.5), "sampling"),
        ):
            for call in (served.client.generate([20], sampling), anext(served.client.stream([20], sampling))):
                before = len(seen.asked)
                with pytest.raises(DomainError) as caught:
                    await call
                error = caught.value
                assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, Reason.INVALID_FIELD)
                assert error.metadata["field"] == field
                assert re.fullmatch(
                    rf"{field}: expected what vLLM takes: .* refuses it: incident \w{{8}}.*", error.message
                )
                asked = [path for path, _ in seen.asked[before:]]
                assert asked.count("/inference/v1/generate") == 1, "it is not tried again"
        [replica] = (await served.client.info()).replicas
        assert replica.serving


async def test_refusals_and_failures_are_told_apart() -> None:
    async def failure(name: str) -> Exception:
        async def answer(request: web.Request) -> web.Response:
            return web.json_response(RECORDED[name]["body"], status=RECORDED[name]["status"])

        app = web.Application()
        app.router.add_post("/inference/v1/generate", answer)
        session = new_session()
        async with TestServer(app) as running:
            try:
                await VllmConnection(session, str(running.make_url("/"))).generate(b"{}", 5.0)
            except (RequestRefused, Unreachable) as error:
                return error
            finally:
                await session.close()
        raise AssertionError("no failure")

    for name in ("too_hot", "bad_regex", "rank"):
        assert isinstance(await failure(name), RequestRefused), name
    hot = await failure("too_hot")
    assert isinstance(hot, RequestRefused) and "temperature must be in [0, 2]" in hot.said
    assert "temperature" not in str(hot), "the server's words are for the log"
    assert isinstance(await failure("no_adapter"), Unreachable)  # it was restarted: the server is loaded again


async def test_a_launched_server_is_told_what_the_backend_needs(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nenv\nexit 3\n')
    script.chmod(0o755)
    session = new_session()

    def connect(address: str) -> VllmConnection:
        return VllmConnection(session, address)

    flags = ("--tensor-parallel-size", "2")
    settings = VllmSettings(python=str(script), flags=flags, environment={"OMP_NUM_THREADS": "1"})
    server = VllmServer(connect("http://127.0.0.1:9"), 1.0, {})
    launched = LaunchedServer(server, connect, settings, "some/model", "0-original", tmp_path / "log")
    with pytest.raises(UnsupportedModel, match="status 3"):
        await launched.start()
    await session.close()
    told = (tmp_path / "log").read_text().splitlines()
    assert {"VLLM_SERVER_DEV_MODE=1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "OMP_NUM_THREADS=1"} <= set(told)
    arguments = told[: told.index("2") + 1]
    assert list(arguments[:4]) == ["-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"]
    assert "--enable-scale-out" in arguments and "processed_logprobs" in arguments
    assert list(arguments[-4:]) == ["--load-format", "safetensors", "--tensor-parallel-size", "2"]


async def _all(parts: AsyncIterator[Sampled]) -> list[Sampled]:
    return [part async for part in parts]
