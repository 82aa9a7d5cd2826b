"""One vLLM server: what it can do, and the calls that change it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mulligan.common.inference import Feature, LoraLimits, SamplingParams
from mulligan.common.tasks import gather_or_cancel
from mulligan.policy.backend import Ask
from mulligan.policy.backends._servers.answers import Aborted, BadAnswer
from mulligan.policy.backends._servers.connection import HttpConnection, RequestRefused, Unreachable
from mulligan.policy.backends._servers.server import EngineServer, Unsuitable
from mulligan.policy.backends._servers.skeleton import Skeleton, last_name
from mulligan.policy.backends.vllm import requests
from mulligan.policy.backends.vllm.connection import VllmConnection

_ALWAYS = frozenset(
    [
        Feature.TOKEN_IDS,
        Feature.LOG_PROBS,
        Feature.SCORE,
        Feature.SCORE_TEMPERATURE,
        Feature.STREAM,
        Feature.TOP_K,
        Feature.SEED,
        Feature.STOP_TOKEN_IDS,
        Feature.REGEX,
        Feature.JSON_SCHEMA,
        Feature.FULL_WEIGHTS,
    ]
)
_GENERATE = "/inference/v1/generate"
_CONTROL = frozenset({"/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version"})
_MODE = "processed_logprobs"
_FORCED = 32  # requests at a time when scoring at a temperature, of all sequences together


class VllmServer(EngineServer):
    connection_type = VllmConnection
    ready_path = "/health"
    # Only with these vLLM has /pause, /collective_rpc, /update_weight_version and others, and /v1/load_lora_adapter.
    launch_environment: ClassVar = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    lora_needs = "--enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in their environment"
    load_adapter_path = "/v1/load_lora_adapter"
    unload_adapter_path = "/v1/unload_lora_adapter"

    def __init__(
        self, connection: HttpConnection, request_seconds: float, fixed: Mapping[str, str], *, guest: bool = False
    ):
        super().__init__(connection, request_seconds, fixed, guest=guest)
        self.changes = 0  # raised before its weights change, and when they have changed
        self._slots = asyncio.Semaphore(_FORCED)

    @staticmethod
    def launch_arguments(
        source: str, label: str, port: int, flags: Sequence[str], key_file: Path | None = None
    ) -> list[str]:
        arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", source]
        arguments += ["--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
        return [*arguments, *EngineServer.load_format(flags), *flags]

    @property
    def context_length(self) -> int:
        """A prompt that is scored needs room for the one token that is sampled behind it."""
        return int(self._model.get("max_model_len") or 0) - 1

    @property
    def features(self) -> frozenset[Feature]:
        found = set(_ALWAYS)
        if self._part("scheduler_config").get("policy") == "priority":
            found.add(Feature.PRIORITY)
        # Adapters are known to the process that they were loaded through.
        one_process = int(self._part("parallel_config").get("_api_process_count") or 1) == 1
        if self._part("lora_config") and one_process and self.load_adapter_path in self.settings["paths"]:
            found.add(Feature.LORA_WEIGHTS)
        return frozenset(found)

    @property
    def deterministic(self) -> bool:
        return False

    @property
    def lora(self) -> LoraLimits:
        config = self._part("lora_config")
        modules = config.get("target_modules") or ()
        return LoraLimits(int(config.get("max_lora_rank") or 0), tuple(sorted(modules)))

    def dtype(self, skeleton: Skeleton) -> str:
        return str(self._model.get("dtype")).removeprefix("torch.")

    async def look(self, skeleton: Skeleton) -> None:
        paths = (await self.connection.get("/openapi.json")).get("paths") or {}
        if _GENERATE not in paths:
            raise Unsuitable("it takes no token ids: start it with --enable-scale-out (vLLM 0.32 or later)")
        if missing := sorted(_CONTROL - set(paths)):
            raise Unsuitable(f"it has no {missing[0]}: start it with VLLM_SERVER_DEV_MODE=1 in its environment")
        config = (await self.connection.get("/server_info?config_format=json")).get("vllm_config")
        if not isinstance(config, dict):
            raise Unsuitable("it does not tell its vllm_config as JSON: is it vLLM 0.32 or later?")
        self.settings = {"paths": frozenset(paths), **config}
        listed = (await self.connection.get("/v1/models")).get("data") or ()
        self.own_path = next((str(card["root"]) for card in listed if not card.get("parent")), "")
        if last_name(self.own_path) not in skeleton.names:
            raise Unsuitable(
                f"it serves {self.own_path}, not {skeleton.source}: `model` has to be what the server was started with"
            )
        if self._model.get("logprobs_mode") != _MODE:
            raise Unsuitable(
                f"its log-probabilities are {self._model.get('logprobs_mode')}: start it with --logprobs-mode {_MODE}"
            )
        self._adapters = {str(card["id"]) for card in listed if card.get("parent")}

    async def probe(self) -> None:
        label = self.label
        found = await self._told_label()
        if label == self.label and found != label:
            raise Unsuitable(f"it holds weights {found!r} instead of {label!r}")

    async def _told_label(self) -> str:
        return str((await self.connection.get("/weight_info", 5.0)).get("weight_version"))

    async def pause(self) -> None:
        self.changes += 1
        await self.connection.control("/pause?mode=keep")
        await self.connection.control("/reset_prefix_cache?reset_running_requests=true")

    async def go_on(self) -> None:
        await self.connection.control("/resume")

    async def was_launched(self, label: str) -> None:
        await self._rename(label)
        await super().was_launched(label)

    async def _load(self, path: str, label: str) -> None:
        """A load that fails leaves layers without weights: the server stays paused until one succeeds."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}, "timeout": self._seconds}
        await self.connection.control("/collective_rpc", body, timeout=self._seconds)
        await self._rename(label)
        self.changes += 1  # what was sent since `pause` waited for these weights

    async def _rename(self, label: str) -> None:
        await self.connection.control("/update_weight_version", {"new_version": label})

    async def _checksum(self) -> str:
        found = await self.connection.control("/weight_checker", {"action": "checksum"}, timeout=self._seconds)
        by_tensor = found.get("checksums")
        return hashlib.sha256(json.dumps(by_tensor, sort_keys=True).encode()).hexdigest() if by_tensor else ""

    async def release_memory(self) -> None:
        raise RequestRefused("vLLM releases memory on some GPUs only, which is not supported here")

    async def resume_memory(self) -> None:
        raise RequestRefused("vLLM releases memory on some GPUs only, which is not supported here")

    async def repeats(self) -> bool:
        ask = Ask([0], SamplingParams(temperature=1.0, max_tokens=8, seed=1))
        body = requests.encode(ask, "", 16, (), stream=False, priority=False)
        try:
            first, second = [requests.decode(await self.connection.generate(body, 60.0)) for _ in range(2)]
        except (Unreachable, RequestRefused, BadAnswer, Aborted):
            return False
        return first.choice.token_ids == second.choice.token_ids

    async def score_one(
        self, ids: Sequence[int], begin: int, temperature: float, adapter: str
    ) -> tuple[set[str], tuple[float, ...]]:
        """vLLM scores a prompt at temperature 1 alone, and not with --enable-lora: on a CPU the engine of vLLM 0.32.0
        dies of log-probabilities of a prompt beside other requests. Otherwise each token is asked for as the one that
        follows its prefix: as many requests of one token as there are tokens, their prefixes from the cache."""
        changes = self.changes
        if begin >= len(ids):
            answers = [
                requests.decode(await self.connection.generate(requests.encode_label(ids, adapter), self._seconds))
            ]
            row: tuple[float, ...] = ()
        elif temperature in (0.0, 1.0) and not self._part("lora_config"):
            body = requests.encode_score(ids, adapter)
            answer = requests.decode(await self.connection.generate(body, self._seconds))
            answers = [answer]
            row = requests.decode_score(answer, ids, begin)
        else:
            answers, row = await self._score_forced(ids, begin, temperature or 1.0, adapter)
        if changes != self.changes:
            raise Aborted("the weights changed while it scored")
        return {label for answer in answers for label, _ in answer.labels(0, 1)}, row

    async def _score_forced(
        self, ids: Sequence[int], begin: int, temperature: float, adapter: str
    ) -> tuple[list[requests.VllmAnswer], tuple[float, ...]]:
        async def ask(place: int) -> requests.VllmAnswer:
            async with self._slots:
                body = requests.encode_forced(ids[:place], ids[place], temperature, adapter)
                return requests.decode(await self.connection.generate(body, self._seconds))

        places = range(begin, len(ids))
        answers = await gather_or_cancel(ask(place) for place in places)
        return answers, tuple(
            requests.decode_forced(answer, ids[place]) for answer, place in zip(answers, places, strict=True)
        )

    @property
    def _model(self) -> Mapping[str, Any]:
        return self._part("model_config")

    def _part(self, name: str) -> Mapping[str, Any]:
        return self.settings.get(name) or {}
