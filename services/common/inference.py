"""Types of inference: prompts, samples, and what describes a policy. Frozen, without protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, made by the model. `arguments` is a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. An assistant's message may have `tool_calls`; with Role.TOOL, `name` is the tool
    that answers."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: str


class StopReason(StrEnum):
    END_OF_TURN = "end_of_turn"
    STOP_STRING = "stop_string"
    MAX_TOKENS = "max_tokens"
    CONTEXT_FULL = "context_full"
    STOP_TOKEN = "stop_token"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are sampled. Log-probabilities are those of softmax(logits / temperature), before top-p and top-k;
    temperature 0 is greedy. At most one of `regex` and `json_schema` is set."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    regex: str | None = None
    json_schema: str | None = None


@dataclass(frozen=True, slots=True)
class VersionSpan:
    policy_version: int
    token_count: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """The next turn of a conversation: the prompt is exactly `token_ids`, then what the template adds for
    `messages`."""

    token_ids: Sequence[int]
    turn_closed: bool  # whether the last sampled token closed its turn
    messages: tuple[Message, ...]


# Messages are rendered by the chat template; token ids are used unchanged.
Prompt = tuple[Message, ...] | list[int] | Continuation


@dataclass(frozen=True, slots=True)
class CallOptions:
    """Options of a call, for every kind of prompt. `GenerateRequest` of mulligan.policy.v1 describes each."""

    policy: str = ""
    request_id: str = ""
    session_id: str = ""
    min_policy_version: int | None = None
    version_wait: float = 0.0  # seconds
    priority: int = 0
    adapter: str = ""
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionPart:
    """One part of a streamed sample. `prompt_token_ids` are set in the first part of the stream alone; `stop_reason`
    and `raw_text`, which is the text of the whole sample, in a sample's last part."""

    index: int  # of the sample
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    policy_versions: tuple[VersionSpan, ...]
    stop_reason: StopReason | None
    raw_text: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample. `prompt_token_ids` is the whole rendered prompt for messages, and only the appended ids for a
    continuation.

    `raw_text` is the text with the special tokens that are marks, and begins with the opening of a thought that the
    template wrote. It is empty if it equals `text`.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    stop_reason: StopReason
    policy_versions: tuple[VersionSpan, ...]
    raw_text: str = ""

    @property
    def marked_text(self) -> str:
        """The text that parsers of answers and tool calls read."""
        return self.raw_text or self.text


class Feature(StrEnum):
    """What an engine can do. `Feature` of mulligan.policy.v1 describes each."""

    TOKEN_IDS = "token_ids"
    LOG_PROBS = "log_probs"
    SCORE = "score"
    SCORE_TEMPERATURE = "score_temperature"
    STREAM = "stream"
    TOP_K = "top_k"
    SEED = "seed"
    STOP_TOKEN_IDS = "stop_token_ids"
    REGEX = "regex"
    JSON_SCHEMA = "json_schema"
    PRIORITY = "priority"
    TOOLS = "tools"
    FULL_WEIGHTS = "full_weights"
    LORA_WEIGHTS = "lora_weights"
    MEMORY_RELEASE = "memory_release"


class PolicyState(StrEnum):
    SERVING = "serving"
    UPDATING = "updating"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """One engine behind a policy. `address` is empty for an engine in the process of the service."""

    address: str
    serving: bool
    in_flight: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class LoraLimits:
    """LoRA adapters that an engine accepts. 0 and empty mean no limit, or an unknown one."""

    max_rank: int = 0
    target_modules: tuple[str, ...] = ()  # last parts of layer names, such as "q_proj"


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    model: str
    fingerprint: str
    policy_version: int
    context_length: int
    vocabulary_size: int
    end_of_turn_token_ids: tuple[int, ...]
    rewrites_history: bool
    deterministic: bool
    compute_seconds: float = 0.0  # seconds in the model since the service started
    name: str = ""
    backend: str = ""
    features: frozenset[Feature] = frozenset(Feature)
    adapters: tuple[str, ...] = ()
    state: PolicyState = PolicyState.SERVING
    problem: str = ""
    frozen: bool = False
    replicas: tuple[ReplicaInfo, ...] = ()
    draining_models: int = 0
    dtype: str = ""  # of the engine's computation, as torch names it; "" if unknown
    canary_tolerance: float | None = None  # None if unknown
    lora: LoraLimits = LoraLimits()
    sparse_uploads: bool = False  # whether UploadWeights takes sparse files


class WeightsKind(StrEnum):
    """`WeightsKind` of mulligan.policy.v1."""

    FULL = "full"
    LORA = "lora"
    ORIGINAL = "original"  # the weights that the model was loaded with


@dataclass(frozen=True, slots=True)
class CanaryProbe:
    """One sequence of a weight check: its tokens, and the trainer's log-probability of softmax(logits) for each token
    after the first."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """Weights in a file that the policy service can read."""

    policy_version: int
    kind: WeightsKind
    uri: str
    sha256: str
    fingerprint: str
    canary: tuple[CanaryProbe, ...] = ()


class VersionState(StrEnum):
    SERVING = "serving"
    KEPT = "kept"
    REMOVED = "removed"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """`PolicyVersion` of mulligan.policy.v1."""

    policy_version: int
    kind: WeightsKind
    state: VersionState
    sha256: str
    fingerprint: str
    created_at: datetime
    problem: str = ""
    canary_difference: float | None = None
    engine_checksum: str = ""
    model: str = ""
