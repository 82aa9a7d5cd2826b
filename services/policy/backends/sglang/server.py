"""One SGLang server: what it can do, and the calls that change it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

from mulligan.common.inference import Feature, LoraLimits, SamplingParams
from mulligan.policy.backend import Ask
from mulligan.policy.backends._servers.answers import BadAnswer
from mulligan.policy.backends._servers.connection import RequestRefused, Unreachable
from mulligan.policy.backends._servers.server import EngineServer, Unsuitable
from mulligan.policy.backends._servers.skeleton import STACKED, Skeleton, last_name
from mulligan.policy.backends.sglang import requests
from mulligan.policy.backends.sglang.connection import SglangConnection

_ALWAYS = frozenset(
    [
        Feature.TOKEN_IDS,
        Feature.LOG_PROBS,
        Feature.SCORE,
        Feature.SCORE_TEMPERATURE,
        Feature.STREAM,
        Feature.TOP_K,
        Feature.STOP_TOKEN_IDS,
        Feature.FULL_WEIGHTS,
    ]
)
# Prefixes per request when scoring at a temperature, and token ids in them.
_FORCED = 128
_FORCED_TOKENS = 262144


class SglangServer(EngineServer):
    connection_type = SglangConnection
    ready_path = "/ready"
    takes_key_file = True
    lora_needs = "--enable-lora, without --dp-size"
    load_adapter_path = "/load_lora_adapter"
    unload_adapter_path = "/unload_lora_adapter"

    @staticmethod
    def launch_arguments(
        source: str, label: str, port: int, flags: Sequence[str], key_file: Path | None = None
    ) -> list[str]:
        arguments = ["-m", "sglang.launch_server", "--model-path", source]
        if key_file is not None:
            arguments += ["--config", str(key_file)]
        arguments += ["--host", "127.0.0.1", "--port", str(port), "--weight-version", label]
        if "--incremental-streaming-output" not in flags:  # without it a stream repeats what came before
            arguments.append("--incremental-streaming-output")
        return [*arguments, *EngineServer.load_format(flags), *flags]

    @property
    def incremental(self) -> bool:
        """Whether each event of a stream has only what is new."""
        return bool(self.settings.get("incremental_streaming_output"))

    @property
    def context_length(self) -> int:
        """SGLang reserves some tokens of a context: what it scores must be shorter than max_req_input_len."""
        return max(0, int(self.settings.get("max_req_input_len") or 0) - 1)

    @property
    def features(self) -> frozenset[Feature]:
        found = set(_ALWAYS)
        if self.settings.get("enable_deterministic_inference"):
            found.add(Feature.SEED)
        if self.settings.get("grammar_backend") not in (None, "none"):
            found |= {Feature.REGEX, Feature.JSON_SCHEMA}
        if self.settings.get("enable_priority_scheduling"):
            found.add(Feature.PRIORITY)
        if self.settings.get("enable_lora") and int(self.settings.get("dp_size") or 1) == 1:
            found.add(Feature.LORA_WEIGHTS)
        if self.settings.get("enable_memory_saver"):
            found.add(Feature.MEMORY_RELEASE)
        return frozenset(found)

    @property
    def deterministic(self) -> bool:
        return bool(self.settings.get("enable_deterministic_inference"))

    @property
    def lora(self) -> LoraLimits:
        """As --max-lora-rank and --lora-target-modules say. Layers that SGLang stacks into one belong together."""
        named = self.settings.get("lora_target_modules") or ()
        taken: set[str] = set() if "all" in named else set(named)
        for group in STACKED:
            if not taken.isdisjoint(group):
                taken |= set(group)
        return LoraLimits(int(self.settings.get("max_lora_rank") or 0), tuple(sorted(taken)))

    def dtype(self, skeleton: Skeleton) -> str:
        told = str(self.settings.get("dtype") or "auto")
        if told == "auto":  # SGLang does not run a float32 model as such unless it is told to
            return "float16" if skeleton.dtype == "float32" else skeleton.dtype
        return {"half": "float16", "float": "float32"}.get(told, told)

    async def look(self, skeleton: Skeleton) -> None:
        self.settings = await self.connection.get("/server_info")
        model = await self.connection.get("/model_info")
        self.own_path = str(self.settings.get("model_path"))
        if not model.get("is_generation") or model.get("model_type") != skeleton.model_type:
            raise Unsuitable(f"it serves {self.own_path}, a {model.get('model_type')}, not {skeleton.source}")
        if last_name(self.own_path) not in skeleton.names:
            raise Unsuitable(
                f"it serves {self.own_path}, not {skeleton.source}: `model` has to be what the server was started with"
            )
        if self.settings.get("preferred_sampling_params"):
            raise Unsuitable("its --preferred-sampling-params change what is sampled")
        if not self.context_length:
            raise Unsuitable("it does not tell its max_req_input_len: is it SGLang 0.5.23 or later?")
        listed = (await self.connection.get("/v1/models")).get("data") or ()
        self._adapters = {str(card["id"]) for card in listed if card.get("parent")}

    async def probe(self) -> None:
        label = self.label
        path = self.path
        found = await self.connection.get("/model_info", 5.0)
        told = str(found.get("weight_version"))
        if (label, path) == (self.label, self.path) and (told != label or found.get("model_path") != path):
            raise Unsuitable(f"it holds weights {told!r} instead of {label!r}")

    async def _told_label(self) -> str:
        return str((await self.connection.get("/model_info", 5.0)).get("weight_version"))

    async def pause(self) -> None:
        await self.connection.control("/pause_generation", {"mode": "retract"})

    async def go_on(self) -> None:
        await self.connection.control("/continue_generation")

    async def _load(self, path: str, label: str) -> None:
        await self.connection.control(
            "/update_weights_from_disk",
            {"model_path": path, "load_format": "auto", "weight_version": label, "flush_cache": True},
            timeout=self._seconds,
        )

    async def _rename(self, label: str) -> None:
        await self.connection.control("/update_weight_version", {"new_version": label, "abort_all_requests": False})

    async def _checksum(self) -> str:
        found = await self.connection.control("/weights_checker", {"action": "checksum"}, timeout=self._seconds)
        return str(found.get("per_engine_checksum") or "")

    async def repeats(self) -> bool:
        ask = Ask([0], SamplingParams(temperature=1.0, max_tokens=8, seed=1))
        bodies = [requests.encode(ask, uuid.uuid4().hex, "", 16, (), stream=False, priority=False) for _ in range(2)]
        try:
            first, second = [requests.decode(await self.connection.generate(body, 60.0)) for body in bodies]
        except (Unreachable, RequestRefused, BadAnswer):
            return False
        return first.output_ids == second.output_ids

    async def release_memory(self) -> None:
        await self.connection.control("/release_memory_occupation", timeout=self._seconds)

    async def resume_memory(self) -> None:
        await self.connection.control("/resume_memory_occupation", timeout=self._seconds)

    async def score_one(
        self, ids: Sequence[int], begin: int, temperature: float, adapter: str
    ) -> tuple[set[str], tuple[float, ...]]:
        """SGLang scores a prompt only at temperature 1. At another temperature each token is requested as the one after
        its prefix: one request per token, with the prefixes from the cache."""
        count = len(ids) - begin
        if count <= 0 or temperature in (0.0, 1.0):
            body = requests.encode_score(ids, uuid.uuid4().hex, adapter, begin)
            answer = requests.decode(await self.connection.generate(body, self._seconds))
            requests.check_finish(answer)
            row = requests.decode_score(answer, count) if count > 0 else ()
            return {label for label, _ in answer.labels(0, 0)}, row
        labels: set[str] = set()
        values: list[float] = []
        size = max(1, min(_FORCED, _FORCED_TOKENS // len(ids)))
        for first in range(begin, len(ids), size):
            places = range(first, min(first + size, len(ids)))
            following = [ids[place] for place in places]
            body = requests.encode_forced([ids[:place] for place in places], following, temperature, adapter)
            answers, row = requests.decode_forced(await self.connection.generate(body, self._seconds), len(places))
            for answer in answers:
                requests.check_finish(answer)
                labels |= {label for label, _ in answer.labels(0, 1)}
            values += row
        return labels, tuple(values)
