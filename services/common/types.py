"""Domain types that services share. Frozen; none knows protobuf. Conversions are in `wire.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """`arguments` is a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """`tool_calls` are the assistant's; `name` is that of the tool which answers, with Role.TOOL."""

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


class Outcome(StrEnum):
    """How an attempt ended. Only the first two carry a reward: an infrastructure failure is never reward 0."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ENV_ERROR = "env_error"
    POLICY_ERROR = "policy_error"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"

    @property
    def has_reward(self) -> bool:
        return self in (Outcome.COMPLETED, Outcome.TRUNCATED)


class StopReason(StrEnum):
    END_OF_TURN = "end_of_turn"
    STOP_STRING = "stop_string"
    MAX_TOKENS = "max_tokens"
    CONTEXT_FULL = "context_full"
    STOP_TOKEN = "stop_token"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Log-probabilities are of softmax(logits / temperature), before top-p and top-k; temperature 0 is greedy.

    At most one of `regex` and `json_schema` is set.
    """

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
    """The next turn of a conversation: exactly `token_ids`, then what the template puts before the next turn."""

    token_ids: tuple[int, ...]
    turn_closed: bool  # whether the last sampled token closed its turn
    messages: tuple[Message, ...]


# What a policy is prompted with: messages are rendered, token ids are used as they are.
Prompt = tuple[Message, ...] | list[int] | Continuation


@dataclass(frozen=True, slots=True)
class CallOptions:
    """How a policy is asked, whatever the prompt. `GenerateRequest` of mulligan.policy.v1 says what each means."""

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
    """What a stream brings at a time. `prompt_token_ids` are in the first part alone, `stop_reason` in a sample's
    last."""

    index: int  # of the sample
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    policy_versions: tuple[VersionSpan, ...]
    stop_reason: StopReason | None


@dataclass(frozen=True, slots=True)
class Completion:
    """`prompt_token_ids`: the whole rendered prompt for messages, only the appended ids for a continuation."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    stop_reason: StopReason
    policy_versions: tuple[VersionSpan, ...]


class SegmentKind(StrEnum):
    PROMPT = "prompt"
    SAMPLED = "sampled"
    ENVIRONMENT = "environment"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one origin. Only sampled ones carry loss, and log-probabilities in the context of sampling."""

    kind: SegmentKind
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    policy_versions: tuple[VersionSpan, ...] = ()

    @property
    def loss(self) -> bool:
        return self.kind is SegmentKind.SAMPLED


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """What went through the policy, start to end: only ever appended to, never decoded and encoded again."""

    segments: tuple[Segment, ...]

    @property
    def token_ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.token_ids]

    @property
    def loss_mask(self) -> list[bool]:
        return [segment.loss for segment in self.segments for _ in segment.token_ids]

    @property
    def log_probs(self) -> list[float]:
        """Of the sampled tokens, in order."""
        return [value for segment in self.segments for value in segment.log_probs]

    @property
    def sampled_count(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments if segment.loss)

    def with_prompt(self, prompt_token_ids: Sequence[int]) -> TokenSequence:
        """The same tokens after another prompt, without log-probabilities: they belong to the old context."""
        first, *rest = self.segments
        assert first.kind is SegmentKind.PROMPT
        return TokenSequence(
            (
                Segment(SegmentKind.PROMPT, tuple(prompt_token_ids)),
                *(Segment(segment.kind, segment.token_ids) for segment in rest),
            )
        )


@dataclass(frozen=True, slots=True)
class Turn:
    observation: str
    text: str  # the agent's answer, decoded, for people; training reads the token sequences
    action: str  # the environment's reading of it
    reward: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a task. `reward` is None unless the outcome carries one. `sequences` has one element, or one per turn
    when the chat template rewrites earlier turns."""

    attempt_id: str
    episode_id: str
    outcome: Outcome
    reward: float | None
    feedback: str
    turns: tuple[Turn, ...]
    final_observation: str
    sequences: tuple[TokenSequence, ...]
    temperature: float
    error: str = ""
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Reflection:
    """`outcome` is of the generation; `reward` is the second attempt's, None until that has one. `policy` names the
    policy that wrote it, where that is not the one that is trained."""

    reflection_id: str
    text: str
    sequences: tuple[TokenSequence, ...]
    temperature: float
    outcome: Outcome
    reward: float | None = None
    error: str = ""
    policy: str = ""

    @property
    def policy_version(self) -> int:
        """The version that wrote its last token; 0 when nothing was sampled."""
        spans = [
            span for sequence in self.sequences for segment in sequence.segments for span in segment.policy_versions
        ]
        return spans[-1].policy_version if spans else 0


@dataclass(frozen=True, slots=True)
class DistilledTarget:
    """A successful second attempt under the first attempt's prompt. Its segments carry no log-probabilities."""

    distilled_id: str
    source_attempt_id: str
    sequences: tuple[TokenSequence, ...]
    reward: float


@dataclass(frozen=True, slots=True)
class Experience:
    """One chain y1 → f1 → Δ → y2 → distillation. Parts that are None did not happen."""

    experience_id: str
    run_id: str
    step: int
    environment: str
    task_id: str
    rollout: int
    first_attempt: Attempt
    reflection: Reflection | None = None
    second_attempt: Attempt | None = None
    distilled: DistilledTarget | None = None
    memory_entry_ids: tuple[str, ...] = ()

    def parts(self) -> Iterator[Attempt | Reflection]:
        """What the policy sampled, in order."""
        yield self.first_attempt
        if self.reflection is not None:
            yield self.reflection
        if self.second_attempt is not None:
            yield self.second_attempt


class Feature(StrEnum):
    """What an engine can do; `Feature` of mulligan.policy.v1 says what each means."""

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
    """One engine behind a policy. `address` is empty for one in the service's own process."""

    address: str
    serving: bool
    in_flight: int = 0
    problem: str = ""


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
    compute_seconds: float = 0.0  # in the model, since the service started
    name: str = ""
    backend: str = ""
    features: frozenset[Feature] = frozenset(Feature)
    adapters: tuple[str, ...] = ()
    state: PolicyState = PolicyState.SERVING
    problem: str = ""
    frozen: bool = False
    replicas: tuple[ReplicaInfo, ...] = ()
    draining_models: int = 0


class WeightsKind(StrEnum):
    """`WeightsKind` of mulligan.policy.v1."""

    FULL = "full"
    LORA = "lora"
    ORIGINAL = "original"  # what the model came with


@dataclass(frozen=True, slots=True)
class CanaryProbe:
    """What a trainer's forward pass says: a log-probability of softmax(logits) for each token after the first."""

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


class Split(StrEnum):
    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The texts with which an agent is addressed; `{name}` marks a placeholder, filled by plain substitution.

    Prompts belong to the environment, so that an algorithm needs to know none. Which text goes into which message is
    the trainer's business (`services/trainer/episode.py`).
    """

    solver: str  # system prompt of a first attempt: x. No placeholders.
    action_reminder: str  # follows a reflection in the second attempt's system prompt. No placeholders.
    reflection_system: str  # system prompt of the reflector. No placeholders.
    reflection: str  # the reflector's user message: {trace} {feedback} {reward} {memory}
    memory_empty: str  # stands for {memory} while the memory holds nothing
    trace_turn: str  # one turn of {trace}: {observation} {action}
    retry: str  # "without reflection": second attempt's system prompt: {trace} {feedback}
    try_again: str  # unary feedback: second attempt's system prompt. No placeholders.
    reflection_open: str = "<prompt>"  # the reflection is the text between the last such pair of marks…
    reflection_close: str = "</prompt>"  # …or, when either is absent, the reflector's whole answer


@dataclass(frozen=True, slots=True)
class EnvironmentInfo:
    name: str
    description: str
    prompts: PromptSet
    max_steps: int  # the true limit: an episode ends at this many steps
    max_reward: float
    deterministic: bool  # same task, same actions → same observations and rewards
    task_counts: dict[Split, int]
    tools: tuple[Tool, ...] = ()  # what the agent may call; the environment finds the calls in its answer
    unavailable: str = ""  # why no episode can be started here


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task is reproducible from its id alone, on any machine."""

    task_id: str
    split: Split
    difficulty: float  # in the environment's own unit; FrozenLake, Sokoban: moves of the shortest solution


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one action led to.

    `observation` is all that the agent sees during the attempt, no-effect notices included. `action` is the
    environment's reading of the agent's text ("Up", "Up (no effect)", "invalid"): it appears in traces shown to a
    reflector. `feedback` is set on the last step only and never enters the attempt's own context. `tool` names the tool
    whose answer the observation is; empty: it speaks as the user.
    """

    observation: str
    action: str
    reward: float = 0.0  # of this step; an attempt's reward is the sum
    done: bool = False
    truncated: bool = False  # done because the step limit was reached
    feedback: str = ""
    tool: str = ""


@dataclass(frozen=True, slots=True)
class EpisodeStep:
    """A step as the environment service answers it. `reward` is None when the step failed; `outcome` and `feedback`
    are set once the episode is over."""

    observation: str
    action: str
    reward: float | None
    done: bool
    outcome: Outcome | None = None
    feedback: str = ""
    error: str = ""
    tool: str = ""


class RetrievalStrategy(StrEnum):
    LATEST_SUCCESS = "latest_success"  # the paper's
    TOP_GAIN = "top_gain"  # greatest reward_after - reward_before; among equals the latest


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a reflection comes from and what it did."""

    run_id: str
    experience_id: str
    environment: str
    task_id: str
    policy_version: int
    reward_before: float
    reward_after: float
    success: bool


@dataclass(frozen=True, slots=True)
class StoredReflection:
    """`version` is the scope's version that the write made; `deleted_version` the one from which it is forgotten."""

    reflection_id: str
    scope: str
    text: str
    provenance: Provenance
    version: int
    created_at: datetime
    deleted_version: int | None = None
