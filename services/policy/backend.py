"""What a policy service needs of a model runtime. A new backend is a module that exports `Settings` and `open`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from mulligan.common.http_keys import key_problem, userinfo_problem
from mulligan.common.inference import (
    CanaryProbe,
    Feature,
    LoraLimits,
    Message,
    ReplicaInfo,
    SamplingParams,
    StopReason,
    Tool,
    VersionSpan,
    WeightsKind,
)
from mulligan.common.plugins import PluginSettings
from mulligan.common.suggest import bad_setting
from mulligan.common.tls import BadTls, HttpsContext, read_client_tls
from mulligan.policy.chat import Chat


class BackendSettings(PluginSettings):
    """Base of the `Settings` that a backend exports.

    The class variables name some of its fields. `local_only`: fields that LoadModel must not set, because they name
    programs, files or variables of the server's machine. `credentials`: for each field that holds an address, the
    fields of the secrets that are sent there, if any; LoadModel names only addresses that the service allows, and drops
    a secret when it changes the address. A secret goes to another machine over TLS alone, unless the backend has a
    field `insecure` and it is set. `exclusive`: fields that list servers whose weights the policy sets; two policies
    cannot list the same server, unless one of them is a guest there (`is_guest`).

    `in_0_1_0`: that release had a table of these settings, and made a digest of it that may still be kept;
    `after_0_1_0` are the fields that it lacked.
    """

    local_only: ClassVar[frozenset[str]] = frozenset()
    credentials: ClassVar[Mapping[str, frozenset[str]]] = {}
    exclusive: ClassVar[frozenset[str]] = frozenset()
    in_0_1_0: ClassVar[bool] = False
    after_0_1_0: ClassVar[frozenset[str]] = frozenset()
    reads_files: ClassVar[bool] = True  # False: `model` and `adapters` are names at an endpoint, never files

    @model_validator(mode="after")
    def _addresses_hold_no_credentials(self) -> Self:
        for name, secrets in self.credentials.items():
            for address in self.addresses(name):
                if problem := userinfo_problem(address):
                    keys = f"; {' or '.join(sorted(secrets))} is for the key" if secrets else ""
                    raise bad_setting(name, f"{problem}{keys}")
        return self

    @property
    def setup(self) -> tuple[str, ...]:
        """Two engines with the same setup give the same checksum for the same weights."""
        return ()

    @property
    def is_guest(self) -> bool:
        """Whether the servers of `exclusive` are another policy's, whose weights this one leaves as they are."""
        return False

    def addresses(self, name: str) -> tuple[str, ...]:
        """Those in one of the fields that `credentials` names."""
        value = getattr(self, name)
        return (value,) if isinstance(value, str) else tuple(value)

    def unprotected(self) -> tuple[str, str] | None:
        """The field with an address that a secret must not go to, and why."""
        allows = "insecure" in type(self).model_fields
        insecure = bool(dict(self).get("insecure"))
        for name, secrets in self.credentials.items():
            if any(getattr(self, secret) for secret in secrets):
                for address in filter(None, self.addresses(name)):
                    if problem := key_problem(address, insecure=insecure):
                        return name, f"{problem}{', or `insecure` beside it' if allows else ''}"
        return None


class HttpSettings(BackendSettings):
    """Base of the `Settings` of backends that call servers by HTTP."""

    local_only: ClassVar[frozenset[str]] = frozenset({"insecure", "tls_ca", "tls_cert", "tls_key"})

    insecure: bool = Field(
        False, description="Keys may go to other machines without TLS, over a network in which you trust everybody."
    )
    tls_ca: Path | None = Field(
        None, description="PEM file with the authorities that https addresses are checked by; the system's if unset."
    )
    tls_cert: Path | None = Field(None, description="PEM file that identifies this service, where servers ask for it.")
    tls_key: Path | None = Field(None, description="The private key of `tls_cert`.")

    @model_validator(mode="after")
    def _tls_is_used(self) -> Self:
        try:
            tls = read_client_tls(self.tls_ca, "", self.tls_cert, self.tls_key)
        except (BadTls, ValueError) as error:
            raise ValueError(f"tls_…: {error}") from error
        for name in self.credentials if tls else ():
            for address in filter(None, self.addresses(name)):
                if urlsplit(address).scheme != "https":
                    raise ValueError(f"{name}: with tls_… set, expected an address that begins with https://")
        return self

    def https(self) -> HttpsContext | None:
        """None where the system's authorities are enough. Raises BadTls."""
        tls = read_client_tls(self.tls_ca, "", self.tls_cert, self.tls_key)
        return HttpsContext(tls) if tls else None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a backend serves; the same for all versions of its weights. A size is 0, and the fingerprint is empty, if
    the engine does not report it."""

    model: str
    fingerprint: str
    context_length: int
    vocabulary_size: int
    end_of_turn_token_ids: tuple[int, ...]
    rewrites_history: bool
    deterministic: bool
    dtype: str  # of the arithmetic, as torch names it: "float32", "bfloat16", …; "" where it is not known
    features: frozenset[Feature]
    adapters: tuple[str, ...] = ()  # fixed LoRA adapters by name
    lora: LoraLimits = LoraLimits()
    # Samples that run or wait at a time: more are refused with QUEUE_FULL before the engine is asked. 0 means unknown:
    # then at most `max_queue` and the most samples of one call.
    capacity: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for one sample, already validated: the prompt is not empty, its ids are in the vocabulary, it is
    shorter than the context, and every option is among the backend's features. A regular expression and a JSON schema
    are checked by the backend itself, beside the event loop: INVALID_FIELD.

    `token_ids` is the prompt; without Feature.TOKEN_IDS it is empty, and `messages` and `tools` are the prompt.
    """

    token_ids: Sequence[int]
    sampling: SamplingParams
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    session_id: str = ""  # asks of one session share their prefix
    priority: int = 0  # greater goes first
    adapter: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The sample of one ask; in a stream, a part of it. `stop_reason` is None except in the last part.

    `text` is set only without Feature.TOKEN_IDS. With it, the caller decodes the token ids.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    stop_reason: StopReason | None
    policy_versions: tuple[VersionSpan, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Scored:
    """For each sequence, the log-probability of every token after the first."""

    log_probs: tuple[tuple[float, ...], ...]
    policy_version: int


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """Weights on disk, with the right checksum, that stay there while they serve.

    `path` is a safetensors file, or the folder of a LoRA adapter; None, with kind ORIGINAL, for the weights that the
    model came with. `canary` is what the trainer says of them.
    """

    path: Path | None
    kind: WeightsKind
    policy_version: int
    sha256: str
    canary: tuple[CanaryProbe, ...] = field(default=(), repr=False)

    @property
    def safetensors(self) -> Path | None:
        if self.path is None:
            return None
        return self.path / "adapter_model.safetensors" if self.kind is WeightsKind.LORA else self.path


class Replica(Protocol):
    """One engine that holds a copy of the weights."""

    @property
    def info(self) -> ReplicaInfo: ...

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> Scored:
        """Scores with this engine and the weights that it holds now, even while it takes no requests."""

    async def checksum(self) -> str:
        """The engine's own checksum of all its weights. Engines with the same setup and weights have the same one."""


# Checks a replica that has loaded these weights before it serves them. Raises DomainError CANARY_FAILED.
Admission = Callable[[Replica, WeightsFile], Awaitable[None]]


class Backend(Protocol):
    """One model, its tokenizer and its chat template. All calls are made on one event loop, and may be concurrent. The
    policy has a lock for those that change it: `update_weights`, `release_memory`, `resume_memory` and `close` come one
    after the other. A backend needs one of its own only for what it changes by itself.
    """

    @property
    def model(self) -> ModelInfo: ...

    @property
    def policy_version(self) -> int:
        """Version of the weights that were loaded last; at first that of the weights the model came with."""

    @property
    def replicas(self) -> Sequence[Replica]:
        """All engines, including those that are not serving now."""

    @property
    def chat(self) -> Chat | None:
        """None without Feature.TOKEN_IDS."""

    @property
    def compute_seconds(self) -> float:
        """Seconds spent in the model since the start; 0 if the engine runs elsewhere."""

    def encode(self, text: str) -> list[int]:
        """Without special tokens."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without special tokens."""

    def decode_marked(self, token_ids: Sequence[int], text: str) -> str:
        """With special tokens, but for those that end a turn and padding. `text` is what `decode` gives."""

    async def generate(self, ask: Ask) -> Sampled:
        """Raises DomainError QUEUE_FULL, ENGINE_UNAVAILABLE. Cancelling the task stops the generation."""

    def stream(self, ask: Ask) -> AsyncIterator[Sampled]:
        """The same in parts, as they are sampled. Closing the iterator stops the generation."""

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float, adapter: str = "") -> Scored:
        """Log-probabilities of softmax(logits / temperature) of valid sequences. These may be fields of a message of
        many megabytes, and lists of them take ten times as much: a backend makes lists of a few at a time. Raises as
        `generate` does."""

    async def update_weights(self, weights: WeightsFile, admit: Admission) -> None:
        """Loads these weights into every replica, has each checked by `admit`, and serves them from now on.

        Running requests finish on the old ones first, or tell by their versions which tokens came from which weights.
        `admit` is kept: a replica that comes back later loads the present weights and passes it before it serves.
        Raises DomainError MODEL_MISMATCH, WEIGHTS_NOT_FOUND or ENGINE_UNAVAILABLE, and then serves what it served
        before; or what `admit` raises, and then the caller loads other weights.
        """

    async def release_memory(self) -> None: ...

    async def resume_memory(self) -> None: ...

    async def close(self) -> None:
        """Also called again, after one that was cancelled: then it closes what is left."""
