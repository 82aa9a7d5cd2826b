"""One SGLang server: what it is, what it holds, and how that is changed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, LoraLimits, ReplicaInfo
from mulligan.common.tasks import gather_or_cancel
from mulligan.policy.backend import Scored
from mulligan.policy.backends.sglang import requests
from mulligan.policy.backends.sglang.connection import HttpConnection, RequestRefused, Unreachable
from mulligan.policy.backends.sglang.folders import TargetWeights
from mulligan.policy.backends.sglang.skeleton import STACKED, Skeleton

_ADAPTER_PREFIX = "mulligan-"
_UNCHECKED = "-unchecked"  # ends the weight_version of a server that may not be asked yet
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


class Unsuitable(Exception):
    """A server that must not serve this policy; the message says why."""


class Server:
    """A `Replica`. `fixed` are adapters that it is given besides the weights: its name of each, and the folder.

    Calls raise Unreachable and RequestRefused unless said otherwise.
    """

    def __init__(self, connection: HttpConnection, request_seconds: float, fixed: Mapping[str, str]):
        self.connection = connection
        self._seconds = request_seconds
        self._fixed = fixed
        self.serving = False
        self.problem = "not asked yet"
        self.times_let_in = 0
        self.in_flight = 0
        self.held: TargetWeights | None = None  # None: unknown
        self.label = ""  # the weight_version that it has to report
        self.path = ""  # the model_path that it has to report
        self.own_path = ""  # of the model that it was started with
        self.settings: Mapping[str, Any] = {}
        self._adapters: set[str] = set()

    @property
    def address(self) -> str:
        return self.connection.address

    @property
    def info(self) -> ReplicaInfo:
        return ReplicaInfo(self.address, self.serving, self.in_flight, "" if self.serving else self.problem)

    @property
    def incremental(self) -> bool:
        """Whether the parts of a stream are what is new in it."""
        return bool(self.settings.get("incremental_streaming_output"))

    @property
    def context_length(self) -> int:
        """SGLang keeps some tokens of a context to itself: what it scores must be shorter than max_req_input_len."""
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
    def lora(self) -> LoraLimits:
        """What it was started with: --max-lora-rank and --lora-target-modules. Layers that SGLang stacks into one go
        together."""
        named = self.settings.get("lora_target_modules") or ()
        taken: set[str] = set() if "all" in named else set(named)
        for group in STACKED:
            if not taken.isdisjoint(group):
                taken |= set(group)
        return LoraLimits(int(self.settings.get("max_lora_rank") or 0), tuple(sorted(taken)))

    async def look(self, skeleton: Skeleton) -> None:
        """Learns what the server is. Raises Unsuitable, too."""
        self.settings = await self.connection.get("/server_info")
        model = await self.connection.get("/model_info")
        self.own_path = str(self.settings.get("model_path"))
        if not model.get("is_generation") or model.get("model_type") != skeleton.model_type:
            raise Unsuitable(f"it serves {self.own_path}, a {model.get('model_type')}, not {skeleton.source}")
        if _name(self.own_path) != _name(skeleton.source):
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
        """Raises Unsuitable when somebody else has changed its weights."""
        label = self.label
        path = self.path
        found = await self.connection.get("/model_info", 5.0)
        if (label, path) == (self.label, self.path) and (
            found.get("weight_version") != label or found.get("model_path") != path
        ):
            raise Unsuitable(f"it holds weights {found.get('weight_version')!r} instead of {label!r}")

    async def pause(self) -> None:
        """Running requests wait, and go on with the weights that are there then: their cache is computed anew."""
        await self.connection.control("/pause_generation", {"mode": "retract"})

    async def go_on(self) -> None:
        await self.connection.control("/continue_generation")

    async def load_base(self, target: TargetWeights, *, checked: bool = True) -> None:
        """The server is paused. Without `checked` its answers are known by a label that nobody accepts."""
        path = target.path or self.own_path
        label = target.label if checked else target.label + _UNCHECKED
        self.held = None
        await self.connection.control(
            "/update_weights_from_disk",
            {"model_path": path, "load_format": "auto", "weight_version": label, "flush_cache": True},
            timeout=self._seconds,
        )
        self.label = label
        self.path = path

    async def load_adapters(self, target: TargetWeights) -> None:
        """Those of this target and the fixed ones; what else of ours is there is from before a restart of ours."""
        wanted = dict(self._fixed)
        if target.adapter:
            wanted[target.adapter] = target.adapter_path
        for name, path in wanted.items():
            if name not in self._adapters:
                body = {"lora_name": name, "lora_path": path}
                await self.connection.control("/load_lora_adapter", body, timeout=self._seconds)
                self._adapters.add(name)

    async def unload_others(self, *targets: TargetWeights) -> None:
        wanted = {target.adapter for target in targets} | set(self._fixed)
        for name in sorted(self._adapters - wanted):
            if name.startswith(_ADAPTER_PREFIX):
                await self.unload(name)

    async def unload(self, name: str) -> None:
        """Returns when no request uses it any longer."""
        if name in self._adapters:
            self._adapters.discard(name)
            await self.connection.control("/unload_lora_adapter", {"lora_name": name}, timeout=self._seconds)

    async def accept(self) -> None:
        """What it holds was checked: from now on it is known by its proper label."""
        if self.label.endswith(_UNCHECKED):
            label = self.label.removesuffix(_UNCHECKED)
            await self.connection.control("/update_weight_version", {"new_version": label, "abort_all_requests": False})
            self.label = label

    async def release_memory(self) -> None:
        await self.connection.control("/release_memory_occupation", timeout=self._seconds)

    async def resume_memory(self) -> None:
        await self.connection.control("/resume_memory_occupation", timeout=self._seconds)

    async def abort(self, rid: str) -> None:
        await self.connection.control("/abort_request", {"rid": rid})

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> Scored:
        """By this server as it is. Raises DomainError ENGINE_UNAVAILABLE when it holds nothing that is known."""
        held = self.held
        if held is None:
            raise DomainError(Reason.ENGINE_UNAVAILABLE, f"{self.address} holds no known weights")
        try:
            rows = await gather_or_cancel(self._score_one(ids, temperature, held) for ids in sequences)
        except (Unreachable, RequestRefused, requests.BadAnswer, requests.Aborted) as error:
            raise DomainError(Reason.ENGINE_UNAVAILABLE, f"{self.address} cannot score: {error}") from error
        return Scored(tuple(rows), held.weights.policy_version)

    async def _score_one(self, ids: Sequence[int], temperature: float, held: TargetWeights) -> tuple[float, ...]:
        labels, row = await score_one(self.connection, ids, 1, temperature, held.adapter, self._seconds)
        if labels - {self.label}:
            raise requests.BadAnswer(f"it answers from weights {sorted(labels)} instead of {self.label!r}")
        return row

    async def checksum(self) -> str:
        """Raises DomainError ENGINE_UNAVAILABLE."""
        held = self.held
        try:
            found = await self.connection.control("/weights_checker", {"action": "checksum"}, timeout=self._seconds)
        except (Unreachable, RequestRefused) as error:
            raise DomainError(Reason.ENGINE_UNAVAILABLE, f"{self.address} tells no checksum: {error}") from error
        checksum = str(found.get("per_engine_checksum") or "")
        # The server's is of the base weights alone.
        return f"{checksum}+{held.weights.sha256}" if checksum and held is not None and held.adapter else checksum


# Prefixes per request when scoring at a temperature, and token ids in them.
_FORCED = 128
_FORCED_TOKENS = 262144


async def score_one(
    connection: HttpConnection, ids: Sequence[int], begin: int, temperature: float, adapter: str, seconds: float
) -> tuple[set[str], tuple[float, ...]]:
    """Log-probabilities of softmax(logits / temperature) of all tokens from `begin`, which is at least 1, and the
    labels of the weights that they are by.

    SGLang scores a prompt at temperature 1 alone. At any other, each token is asked for as the one that follows its
    prefix: as many requests of one token as there are tokens, their prefixes from the cache.
    """
    count = len(ids) - begin
    if count <= 0 or temperature in (0.0, 1.0):
        body = requests.encode_score(ids, uuid.uuid4().hex, adapter, begin)
        answer = requests.decode(await connection.generate(body, seconds))
        requests.check_finish(answer)
        row = requests.decode_score(answer, count) if count > 0 else ()
        return {label for label, _ in answer.labels(0, 0)}, row
    labels: set[str] = set()
    values: list[float] = []
    size = max(1, min(_FORCED, _FORCED_TOKENS // len(ids)))
    for first in range(begin, len(ids), size):
        places = range(first, min(first + size, len(ids)))
        body = requests.encode_forced([ids[:place] for place in places], [ids[p] for p in places], temperature, adapter)
        answers, row = requests.decode_forced(await connection.generate(body, seconds), len(places))
        for answer in answers:
            requests.check_finish(answer)
            labels |= {label for label, _ in answer.labels(0, 1)}
        values += row
    return labels, tuple(values)


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
